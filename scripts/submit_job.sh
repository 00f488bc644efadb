#!/usr/bin/env bash
# Submits a training run of this checkout to a Ray cluster as a job, and follows its output.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: scripts/submit_job.sh [--start-local | --no-wait] [OPTION OF recipes.grpo_math ...]

Sends this checkout to a cluster's job server and runs `python -m recipes.grpo_math OPTION ...` there. The server is
RAY_API_SERVER_ADDRESS, else that of RAY_ADDRESS, else http://127.0.0.1:8265. The cluster's nodes need this checkout's
Python packages: start Ray there with `scripts/run ray start --head`.

  --start-local   start a Ray on this machine for this one job, and end it with the job
  --no-wait       return once the job is accepted
TEXT
}

default_port=8265 # of Ray's job server

say() { echo "lockstep: $*" >&2; }

is_listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Starts a Ray whose processes end with it; it asks for a token, which it makes if there is none.
start_local_ray() {
    if is_listening "$default_port"; then
        say "port $default_port is taken: if that is a Ray, submit to it without --start-local"
        exit 1
    fi
    export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$default_port
    (umask 077 && scripts/run ray get-auth-token --generate >/dev/null)
    say "starting a local Ray for this job"
    scripts/run ray start --head --block --port=0 --dashboard-host=127.0.0.1 --dashboard-port="$default_port" \
        --disable-usage-stats </dev/null >/dev/null &
    ray_process=$!
    trap 'kill "$ray_process" 2>/dev/null; wait "$ray_process" || true' EXIT
    for _ in {1..120}; do
        if is_listening "$default_port"; then return; fi
        kill -0 "$ray_process" 2>/dev/null || break
        sleep 0.5
    done
    say "the local Ray did not start; see /tmp/ray/session_latest/logs"
    exit 1
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
caller=$PWD
cd -- "$root"

start_local=false
submit_options=(--working-dir .)
while (($# > 0)); do
    case $1 in
    --start-local) start_local=true ;;
    --no-wait) submit_options+=(--no-wait) ;;
    -h | --help) usage && exit ;;
    *) break ;;
    esac
    shift
done
if $start_local && [[ ${submit_options[*]} == *--no-wait* ]]; then
    say "--start-local ends its Ray with the job, so it has to wait for it: leave out --no-wait"
    exit 2
fi

# A job works in a copy of the checkout that Ray deletes some day; the run's files must not go with it.
if [[ " $* " != *" --output-dir"* && " $* " != *" --output_dir"* ]]; then
    set -- "$@" --output-dir "$caller/outputs/job-$(date +%Y%m%d-%H%M%S)"
fi

scripts/run true # set up now, if need be, and say so
token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
if $start_local; then
    start_local_ray
elif [[ -z ${RAY_API_SERVER_ADDRESS:-}${RAY_ADDRESS:-} ]]; then
    export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$default_port
    if ! is_listening "$default_port"; then
        say "no Ray listens at $RAY_API_SERVER_ADDRESS: start one with \`scripts/run ray start --head\`,"
        say "name one with RAY_API_SERVER_ADDRESS, or let --start-local start one for this job"
        exit 1
    fi
fi
# Ray's job client sends the token only when told to.
if [[ -z ${RAY_AUTH_MODE:-} && (-f $token || -n ${RAY_AUTH_TOKEN:-}) ]]; then
    export RAY_AUTH_MODE=token
fi
scripts/run ray job submit "${submit_options[@]}" \
    --runtime-env-json '{"excludes": ["/.venv", "/.git", "/outputs", "/.pytest_cache", "/.ruff_cache", "/.hypothesis"]}' \
    -- python -m recipes.grpo_math "$@"
