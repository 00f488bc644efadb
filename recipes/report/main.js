// Main: starts the page from its data; what is chosen stays in the address, so that a reload comes back to it.

const RELOAD_SECONDS = 10;

class State {
  constructor() {
    this.values = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
  }
  get(name) {
    return this.values.get(name);
  }
  set(name, value) {
    if (value === null || value === "") this.values.delete(name);
    else this.values.set(name, value);
    history.replaceState(null, "", `#${this.values}`);
  }
}

function follow(state) {
  const box = byId("follow");
  let timer = null;
  const apply = () => {
    clearTimeout(timer);
    if (box.checked) timer = setTimeout(() => location.reload(), RELOAD_SECONDS * 1000);
  };
  box.checked = state.get("follow") === "yes";
  box.addEventListener("change", () => { state.set("follow", box.checked ? "yes" : null); apply(); });
  apply();
}

function read(id) {
  return JSON.parse(byId(id).textContent);
}

const state = new State();
new Charts(read("curves-data"), byId("charts"));
new Rollouts(read("samples-data"), state);
follow(state);
