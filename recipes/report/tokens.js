// Tokens: one completion as its tokens, coloured by what is asked for; each can be read by pointer or keyboard.

class Tokens {
  constructor(sample, largestAdvantage) {
    Object.assign(this, { sample, largestAdvantage, place: null });
    this.spans = sample.ids.map((_, i) => element("span", { class: "token", "data-token": i }, ...this.content(i)));
    this.container = element("div", { class: sample.texts ? "tokens" : "tokens ids", tabindex: "0", role: "application", "aria-label": `Completion, ${sample.num_tokens} tokens; arrow keys read them` }, ...this.spans);
    this.readout = element("output", { class: "readout", "aria-live": "polite" });
    this.legend = element("div", { class: "scale" });
    this.read(null);
    this.listen();
  }

  // The token's own text. One that only begins a character, which a later token completes, has none.
  content(i) {
    const { ids, texts } = this.sample;
    if (!texts) return [String(ids[i])];
    return texts[i] === "" ? [element("span", { class: "mark" }, "◌")] : shown(texts[i]);
  }

  colour(name) {
    const { versions } = this.sample;
    this.spans.forEach((span, i) => {
      span.className = `token ${this.classOf(name, i)}${i === this.place ? " active" : ""}`;
      span.querySelector(".version")?.remove();
      if (name === "version" && (i === 0 || versions[i] !== versions[i - 1])) span.prepend(element("span", { class: "version" }, `v${versions[i]}`));
    });
    this.legend.replaceChildren(...this.legendOf(name));
  }

  classOf(name, i) {
    const { logprobs, versions, advantages } = this.sample;
    if (name === "logprob") return `surprise${levelOf(logprobs[i])}`;
    if (name === "version") return `version${versions[i] % 4}`;
    if (name === "advantage" && advantages[i]) return `${advantages[i] > 0 ? "plus" : "minus"}${Math.ceil((3 * Math.abs(advantages[i])) / this.largestAdvantage)}`;
    return "";
  }

  legendOf(name) {
    const item = (kind, text) => element("span", { class: "scale-item" }, element("span", { class: `token ${kind}` }, "abc"), text);
    if (name === "logprob") {
      const names = ["p ≥ 0.9", "≥ 0.5", "≥ 0.2", "≥ 0.05", "≥ 0.01", "less likely"];
      return names.map((text, level) => item(`surprise${level}`, text));
    }
    if (name === "version") {
      const versions = [...new Set(this.sample.versions)];
      return versions.slice(0, 12).map((version) => item(`version${version % 4}`, `version ${version}`));
    }
    if (name === "advantage") return [item("minus3", "negative: made less likely"), item("", "0"), item("plus3", "positive: made more likely")];
    return [];
  }

  read(place) {
    this.spans[this.place]?.classList.remove("active");
    this.place = place;
    if (place === null) {
      this.readout.replaceChildren(element("span", { class: "hint" }, "Point at a token, or Tab here and use ← and →."));
      return;
    }
    this.spans[place].classList.add("active");
    const { ids, texts, logprobs, versions, advantages } = this.sample;
    const text = texts ? (texts[place] === "" ? ["begins a character that a later token completes"] : [element("code", {}, ...shown(texts[place]))]) : [];
    const logprob = logprobs[place];
    const facts = [`id ${ids[place]}`, `log-probability ${logprob === null ? "–" : minus(String(logprob))}`, logprob === null ? "" : `p = ${figure(Math.exp(logprob))}`,
      `version ${versions[place]}`, number(advantages[place], null) === null ? "" : `advantage ${signed(advantages[place])}`];
    this.readout.replaceChildren(element("span", {}, `token ${place + 1} of ${this.sample.num_tokens}`), ...text.map((node) => element("span", {}, node)),
      ...facts.filter(Boolean).map((fact) => element("span", {}, fact)));
  }

  listen() {
    const placeOf = (event) => event.target.closest("[data-token]")?.dataset.token;
    for (const kind of ["pointerover", "click"]) {
      this.container.addEventListener(kind, (event) => { if (placeOf(event) !== undefined) this.read(Number(placeOf(event))); });
    }
    this.container.addEventListener("keydown", (event) => {
      const [now, end] = [this.place ?? -1, this.spans.length - 1];
      const place = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: end }[event.key];
      if (place === undefined || end < 0) return;
      event.preventDefault();
      this.read(Math.max(0, Math.min(place, end)));
      scrollInside(this.container, this.spans[this.place]);
    });
  }
}

function levelOf(logprob) {
  if (logprob === null) return PROBABILITIES.length;
  const level = PROBABILITIES.findIndex((probability) => Math.exp(logprob) >= probability);
  return level < 0 ? PROBABILITIES.length : level;
}
