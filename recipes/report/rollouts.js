// Rollouts: the samples that the report holds, found by step, group and reward, and read token by token.

const SORTS = {
  "as drawn": null,
  "highest reward": (a, b) => number(b.reward) - number(a.reward),
  "lowest reward": (a, b) => number(a.reward, Infinity) - number(b.reward, Infinity),
  "longest": (a, b) => b.num_tokens - a.num_tokens,
  "shortest": (a, b) => a.num_tokens - b.num_tokens,
  "highest advantage": (a, b) => number(b.meanAdvantage) - number(a.meanAdvantage),
  "lowest advantage": (a, b) => number(a.meanAdvantage, Infinity) - number(b.meanAdvantage, Infinity),
};
const COLOURINGS = { logprob: "Log-probability", version: "Policy version", advantage: "Advantage", none: "None" };
const PROBABILITIES = [0.9, 0.5, 0.2, 0.05, 0.01]; // a token below the n-th is of level n

function number(value, otherwise = -Infinity) {
  return value === null || value === undefined ? otherwise : value;
}

function mean(values) {
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
}

// The steps' samples as one list; each knows its step and what its group shares.
function samplesOf(steps) {
  return steps.flatMap(({ step, groups }) => groups.flatMap(({ samples, ...group }) => samples.map((sample) => {
    const versions = sample.versions.flatMap(([version, count]) => Array(count).fill(version));
    const advantages = Array.isArray(sample.advantage) ? sample.advantage : sample.ids.map(() => sample.advantage);
    return { ...sample, versions, advantages, step, group, key: `${step}/${group.group_id}/${sample.index}`,
      meanAdvantage: Array.isArray(sample.advantage) ? mean(sample.advantage) : sample.advantage };
  })));
}

class Rollouts {
  constructor(steps, state) {
    this.steps = steps;
    this.samples = samplesOf(steps);
    this.state = state; // step, group, sort, colour, sample: what the address keeps
    this.largest = Math.max(1e-9, ...this.samples.map((sample) => Math.max(...sample.advantages.map((value) => Math.abs(number(value, 0))), 0)));
    if (!steps.length) {
      byId("rollouts").replaceChildren(byId("rollouts-title"), element("p", { class: "hint" }, "This run keeps no rollouts: num_logged_groups is 0, or no step is done yet."));
      return;
    }
    if (!this.steps.some(({ step }) => String(step) === state.get("step")) && state.get("step") !== "all") state.set("step", steps.at(-1).step);
    this.fill("step", [...steps.map(({ step }) => [step, step]), ["all", "all kept"]]);
    this.fill("sort", Object.keys(SORTS).map((name) => [name, name]));
    this.fillGroups();
    this.listen();
    this.list();
  }

  fill(id, options) {
    const select = byId(id);
    select.replaceChildren(...options.map(([value, text]) => element("option", { value }, ...shown(String(text)).map((node) => node.textContent ?? node))));
    if (this.state.get(id) !== null) select.value = this.state.get(id);
    if (select.selectedIndex < 0) select.selectedIndex = 0;
  }

  fillGroups() {
    const groups = [...new Set(this.ofStep().map((sample) => sample.group.group_id))];
    this.fill("group", [["", "all"], ...groups.map((group) => [group, group])]);
  }

  ofStep() {
    const step = byId("step").value;
    return step === "all" ? this.samples : this.samples.filter((sample) => String(sample.step) === step);
  }

  wanted() {
    const group = byId("group").value;
    const [from, to] = [byId("from-reward").value, byId("to-reward").value];
    const found = this.ofStep().filter((sample) => (!group || sample.group.group_id === group)
      && (from === "" || number(sample.reward) >= Number(from)) && (to === "" || number(sample.reward, Infinity) <= Number(to)));
    const order = SORTS[byId("sort").value];
    return order ? found.sort(order) : found;
  }

  list() {
    const found = this.wanted();
    this.shownSamples = found;
    const step = this.steps.find((candidate) => String(candidate.step) === byId("step").value);
    const leftOut = step?.left_out ? `; ${step.left_out} more in rollouts.jsonl` : "";
    byId("num-shown").textContent = `${found.length} ${found.length === 1 ? "sample" : "samples"}${leftOut}`;
    byId("samples").replaceChildren(...found.map((sample, i) => this.item(sample, i)));
    const kept = found.findIndex((sample) => sample.key === this.state.get("sample"));
    this.select(kept < 0 ? 0 : kept, false);
  }

  item(sample, i) {
    return element("li", { role: "option", id: `sample-${i}`, "data-place": i, "aria-selected": "false" },
      element("span", { class: "name" }, ...shown(`${byId("step").value === "all" ? `step ${sample.step} · ` : ""}${sample.group.group_id} #${sample.index}`)),
      element("span", { class: `reward ${number(sample.reward, 0) > 0 ? "good" : ""}` }, sample.reward === null ? "no reward" : figure(sample.reward)),
      element("span", { class: "snippet" }, ...oneLine(this.text(sample), 90)),
      element("span", { class: "size" }, `${sample.num_tokens.toLocaleString("en")} tok`));
  }

  text(sample) {
    return sample.texts ? sample.texts.join("") : sample.completion;
  }

  select(place, isMoved = true) {
    this.place = Math.max(0, Math.min(place, this.shownSamples.length - 1));
    const list = byId("samples");
    list.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    const item = list.children[this.place];
    item?.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", item?.id ?? "");
    if (item && isMoved) scrollInside(list, item);
    const sample = this.shownSamples[this.place];
    if (sample) this.state.set("sample", sample.key);
    this.show(sample);
  }

  show(sample) {
    if (!sample) {
      byId("sample").replaceChildren(element("p", { class: "hint" }, "No sample is like that. Widen the range of rewards, or choose all groups."));
      return;
    }
    this.tokens = new Tokens(sample, this.largest);
    const messages = sample.group.prompt.map(({ role, text }) => element("div", { class: "message" },
      role ? element("span", { class: "role" }, ...shown(role)) : "", element("pre", {}, ...shown(text))));
    byId("sample").replaceChildren(
      element("h3", {}, ...shown(`Step ${sample.step} · ${sample.group.group_id} · sample ${sample.index}`)),
      this.facts(sample),
      element("h4", {}, "Prompt"), ...messages,
      ...(sample.group.answer ? [element("h4", {}, "Right answer"), element("pre", {}, ...shown(sample.group.answer))] : []),
      element("div", { class: "completion-head" }, element("h4", {}, "Completion"), this.colourChoice()),
      ...(sample.texts ? [] : [element("pre", {}, ...shown(sample.completion)), element("p", { class: "hint" }, "This run has no texts of single tokens; these are their ids.")]),
      this.tokens.container, this.tokens.readout, this.tokens.legend,
      sample.num_tokens > sample.ids.length ? element("p", { class: "hint" }, `The first ${sample.ids.length.toLocaleString("en")} of ${sample.num_tokens.toLocaleString("en")} tokens; all are in rollouts.jsonl.`) : "",
    );
    this.colour();
  }

  facts(sample) {
    const versions = [...new Set(sample.versions)];
    const facts = {
      Reward: sample.reward === null ? "none (masked)" : figure(sample.reward),
      Advantage: sample.meanAdvantage === null ? "–" : `${signed(sample.meanAdvantage)}${Array.isArray(sample.advantage) ? " (mean)" : ""}`,
      Finish: sample.finish_reason,
      Tokens: sample.num_tokens.toLocaleString("en"),
      "Mean log-prob": figure(mean(sample.logprobs.filter((value) => value !== null))),
      [versions.length > 1 ? "Versions" : "Version"]: versions.join(", "),
      Seed: sample.seed,
    };
    return element("dl", { class: "facts" }, ...Object.entries(facts).map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, ...shown(String(value))))));
  }

  colourChoice() {
    const choices = Object.entries(COLOURINGS).map(([name, label]) => {
      const input = element("input", { type: "radio", name: "colouring", value: name });
      input.checked = name === (this.state.get("colour") ?? "logprob");
      input.addEventListener("change", () => { this.state.set("colour", name); this.colour(); });
      return element("label", {}, input, element("span", {}, label));
    });
    return element("fieldset", { class: "choice" }, element("legend", {}, "Colour tokens by"), ...choices);
  }

  colour() {
    this.tokens?.colour(this.state.get("colour") ?? "logprob");
  }

  nextColour() {
    const names = Object.keys(COLOURINGS);
    const name = names[(names.indexOf(this.state.get("colour") ?? "logprob") + 1) % names.length];
    document.querySelector(`input[name=colouring][value=${name}]`)?.click();
  }

  moveStep(by) {
    const select = byId("step");
    const place = Math.max(0, Math.min(select.selectedIndex + by, select.options.length - 1));
    if (place === select.selectedIndex) return;
    select.selectedIndex = place;
    this.onStep();
  }

  onStep() {
    this.state.set("step", byId("step").value);
    this.fillGroups();
    this.list();
  }

  listen() {
    byId("step").addEventListener("change", () => this.onStep());
    byId("previous-step").addEventListener("click", () => this.moveStep(-1));
    byId("next-step").addEventListener("click", () => this.moveStep(1));
    for (const id of ["group", "sort"]) byId(id).addEventListener("change", () => { this.state.set(id, byId(id).value); this.list(); });
    for (const id of ["from-reward", "to-reward"]) byId(id).addEventListener("input", () => this.list());
    byId("samples").addEventListener("click", (event) => {
      const item = event.target.closest("[data-place]");
      if (item) this.select(Number(item.dataset.place));
    });
    byId("samples").addEventListener("keydown", (event) => {
      const place = { ArrowUp: this.place - 1, ArrowDown: this.place + 1, Home: 0, End: this.shownSamples.length - 1, PageUp: this.place - 10, PageDown: this.place + 10 }[event.key];
      if (place === undefined) return;
      event.preventDefault();
      this.select(place);
    });
    document.addEventListener("keydown", (event) => this.onKey(event));
  }

  // Keys that work anywhere but where something is typed.
  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input:not([type=radio]), select, textarea")) return;
    if (event.key === "[") this.moveStep(-1);
    else if (event.key === "]") this.moveStep(1);
    else if (event.key === "c") this.nextColour();
  }
}

function scrollInside(list, item) {
  const [top, bottom] = [item.offsetTop, item.offsetTop + item.offsetHeight];
  if (top < list.scrollTop) list.scrollTop = top;
  else if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
}
