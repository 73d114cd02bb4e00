// One exchange on the page: the question, and one answer, or three side by side. Chunks go in, the view follows.

import { heatLeaf, mergeTokens, openToKeys } from "./heat.js";
import { plain, render } from "./markdown.js";
import { whyOf } from "./rewrite.js";
import { element, known, percent, t, worded } from "./strings.js";

const PHASES = ["accepted", "draft", "judge", "search", "rewrite"];

export class Turn {
  constructor(question, { dial, compare, verify }) {
    this.answers = compare
      ? [new Answer("creative", 1, verify), new Answer("factual", 0, verify), new Answer("ensemble", dial, verify)]
      : [new Answer("tiger", dial, verify)];
    this.node = element("article", compare ? "turn compared" : "turn");
    const asked = element("div", "asked");
    asked.append(worded("span", "hidden", "you"), element("span", "", question));
    const row = element("div", "answers");
    row.append(...this.answers.map((answer) => answer.node));
    this.node.append(asked, row);
  }

  // The answer that the conversation goes on with.
  get main() {
    return this.answers[this.answers.length - 1];
  }

  take(chunk) {
    const choice = (chunk.choices || [])[0];
    if (choice) this.answers[choice.index]?.take(choice, chunk.ensemble || {});
  }

  cancelled() {
    for (const answer of this.answers) if (!answer.done) answer.close(worded("span", "badge", "cancelled"));
  }

  // The error is said once, in the last answer that was open; `again` asks the same question once more.
  failed(error, again) {
    for (const answer of this.answers) if (answer !== this.main && !answer.done) answer.close();
    const line = element("span", "error", errorText(error));
    line.setAttribute("role", "alert");
    this.main.close(line, ...(error.status === 429 ? countdown(error.retryAfter ?? 1, again) : []));
  }
}

class Answer {
  constructor(name, dial, verify) {
    this.text = "";
    this.tokens = [];
    this.done = false;
    this.drawing = null;
    this.began = performance.now();
    this.phases = ["accepted", "draft", ...(verify ? ["judge"] : [])];
    this.node = element("section", `answer ${name}`);
    const head = element("header");
    head.append(worded("h2", "", name), worded("small", "", "dial_at", { value: dial.toFixed(2) }));
    this.body = element("div", "text");
    this.body.setAttribute("role", "group");
    this.body.dataset.label = "words";
    this.body.setAttribute("aria-label", t("words"));
    this.status = element("footer", "status");
    this.node.append(head, this.body, this.status);
    this.enter("sent");
  }

  take(choice, ensemble) {
    if (ensemble.phase) this.enter(ensemble.phase);
    else if (this.phase === "sent") this.enter("accepted");
    const text = choice.delta?.content;
    if (text || ensemble.tokens) {
      if (this.phase === "accepted") this.enter("draft");
      this.text += text || "";
      if (!choice.finish_reason) this.tokens.push(...(ensemble.tokens || []));
      this.draw();
    }
    if (choice.finish_reason) this.finish(choice.finish_reason, ensemble);
  }

  enter(phase) {
    this.phase = phase;
    if (phase !== "sent" && !this.phases.includes(phase)) {
      const place = (name) => PHASES.indexOf(name) + 1 || PHASES.length + 1; // one of a newer server comes last
      this.phases = [...this.phases, phase].sort((one, two) => place(one) - place(two));
    }
    const list = element("ol", "phases");
    const now = this.phases.indexOf(phase);
    this.phases.forEach((name, at) => {
      const item = known(`phase_${name}`) ? worded("li", "", `phase_${name}`) : element("li", "", name);
      if (at < now) item.className = "past";
      if (at === now) item.setAttribute("aria-current", "step");
      list.append(item);
    });
    this.status.replaceChildren(list);
  }

  // At most once a frame: a whole answer arrives in one go, and Markdown is read from its beginning.
  draw() {
    this.drawing ??= requestAnimationFrame(() => this.drawNow());
  }

  drawNow() {
    cancelAnimationFrame(this.drawing);
    this.drawing = null;
    const groups = mergeTokens(this.tokens);
    const told = groups.map((group) => group.text).join("");
    this.body.replaceChildren(render(this.text, told === this.text ? heatLeaf(groups) : plain(this.text)));
    openToKeys(this.body);
  }

  finish(reason, ensemble) {
    if (ensemble.tokens?.length) this.tokens = ensemble.tokens;
    const verdict = known(`verdict_${ensemble.verdict}`) ? ensemble.verdict : "unverified";
    const badge = worded("span", `badge ${verdict}`, `verdict_${verdict}`);
    const facts = [
      worded("span", "", "weight", { value: percent(ensemble.w_mean) }),
      worded("span", "", "tokens", { count: this.tokens.length }),
      worded("span", "", "seconds", { value: ((performance.now() - this.began) / 1000).toFixed(1) }),
    ];
    if (reason === "length") facts.push(worded("span", "", "cut"));
    this.close(badge, ...facts);
    const why = whyOf(ensemble, this.text);
    if (why) this.node.append(why);
  }

  close(...nodes) {
    this.done = true;
    this.drawNow();
    this.status.replaceChildren(...nodes);
  }
}

export function errorText(error) {
  for (const name of [`error_${error.code}`, `error_${error.status}`]) if (known(name)) return t(name);
  return error.message.split("\n")[0];
}

function countdown(seconds, again) {
  const left = element("span", "countdown");
  left.setAttribute("role", "timer");
  const button = worded("button", "quiet", "again");
  button.type = "button";
  button.addEventListener("click", () => {
    button.disabled = true;
    again();
  });
  const until = Date.now() + 1000 * seconds;
  const tick = () => {
    const rest = Math.ceil((until - Date.now()) / 1000);
    button.disabled = rest > 0;
    left.textContent = rest > 0 ? t("wait", { seconds: rest }) : "";
    if (rest > 0) setTimeout(tick, 250);
  };
  tick();
  return [left, button];
}
