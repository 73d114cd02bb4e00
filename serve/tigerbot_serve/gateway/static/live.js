// The live panel: what the replicas do now and what their answers came to, asked every two seconds while it is open and
// the page is seen. Each reading is of one replica; those of the last seconds are added up.

import { liveNumbers } from "./api.js";
import { element, percent, t, worded } from "./strings.js";
import { errorText } from "./turn.js";

const EVERY_MS = 2000;
const FRESH_MS = 15_000;
const POINTS = 60;

export class LivePanel {
  constructor(node, button, keyOf) {
    Object.assign(this, { node, button, keyOf, readings: new Map(), rates: [], timer: null });
    button.addEventListener("click", () => this.toggle());
    document.addEventListener("visibilitychange", () => this.poll());
  }

  toggle() {
    this.node.hidden = !this.node.hidden;
    this.button.setAttribute("aria-expanded", String(!this.node.hidden));
    this.poll();
  }

  async poll() {
    clearTimeout(this.timer);
    if (this.node.hidden || document.hidden) return;
    try {
      const reading = await liveNumbers(this.keyOf());
      this.readings.set(reading.replica, { ...reading, at: Date.now() });
      this.draw(reading.replicas);
    } catch (error) {
      this.node.replaceChildren(element("p", "error", t("live_off", { reason: errorText(error) })));
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.poll(), EVERY_MS);
  }

  draw(states) {
    for (const [name, one] of this.readings) if (one.at < Date.now() - FRESH_MS) this.readings.delete(name);
    const all = [...this.readings.values()];
    const sum = (name) => all.reduce((total, one) => total + (one[name] ?? 0), 0);
    const slowest = (name) => Math.max(...all.map((one) => one[name] ?? -1));
    const rate = sum("tokens_per_s");
    this.rates = [...this.rates, rate].slice(-POINTS);
    const starting = states.STARTING || 0;
    const answers = worded("small", "", "live_answers", { count: sum("answers") });
    this.node.replaceChildren(
      tile("live_replicas", String(states.RUNNING ?? all.length), starting ? worded("small", "", "live_starting", { count: starting }) : null),
      tile("live_slots", `${sum("slots_used")} / ${sum("slots")}`, meter(sum("slots_used"), sum("slots"))),
      tile("live_queue", String(sum("queued")), worded("small", "", "live_queue_tokens", { count: sum("outstanding_tokens") })),
      tile("live_rate", rate.toFixed(rate < 10 ? 1 : 0), curve(this.rates)),
      tile("live_p50", duration(slowest("p50_s")), answers),
      tile("live_p99", duration(slowest("p99_s")), answers.cloneNode(true)),
      rewritten(all, sum("rewrites")),
      weights(all),
    );
  }
}

function tile(name, value, ...below) {
  const node = element("div", "tile");
  node.append(worded("span", "name", name), element("b", "", value), ...below.filter(Boolean));
  return node;
}

// The share of checked answers that were changed, and how all of them came out.
function rewritten(all, tried) {
  const count = (verdict) => all.reduce((total, one) => total + (one.verdicts?.[verdict] ?? 0), 0);
  const found = Object.fromEntries(["ok", "rewritten", "flagged", "unverified"].map((name) => [name, count(name)]));
  const checked = Object.values(found).reduce((total, one) => total + one, 0);
  return tile(
    "live_rewritten",
    percent(checked ? found.rewritten / checked : null),
    worded("small", "", "live_checked", { count: checked, tried }),
    worded("small", "verdicts", "live_verdicts", found),
  );
}

// How creative the tokens were: a bar for each tenth of w, from facts to ideas. Each bar has its share as text.
function weights(all) {
  const tenths = Array.from({ length: 10 }, (_, at) => all.reduce((total, one) => total + (one.w_tenths?.[at] ?? 0), 0));
  const tokens = tenths.reduce((total, one) => total + one, 0);
  const mean = all.reduce((total, one) => total + (one.w_mean ?? 0) * (one.w_tenths ?? []).reduce((sum, n) => sum + n, 0), 0);
  const bars = element("ol", "bars");
  tenths.forEach((count, at) => {
    const bar = element("li");
    bar.style.setProperty("--high", count / Math.max(1, ...tenths));
    const share = percent(tokens ? count / tokens : null);
    bar.append(worded("span", "hidden", "live_w_bar", { from: 10 * at, to: 10 * at + 10, share }));
    bars.append(bar);
  });
  const ends = element("div", "ends");
  ends.append(worded("small", "", "facts"), worded("small", "", "live_w_tokens", { count: tokens }), worded("small", "", "ideas"));
  return tile("live_w", percent(tokens ? mean / tokens : null), bars, ends);
}

function meter(used, all) {
  const node = element("meter");
  Object.assign(node, { min: 0, max: Math.max(1, all), value: used });
  node.setAttribute("aria-hidden", "true");
  return node;
}

function curve(rates) {
  const space = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(space, "svg");
  picture.setAttribute("viewBox", `0 0 ${POINTS - 1} 20`);
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(space, "polyline");
  const top = Math.max(1, ...rates);
  const shift = POINTS - rates.length;
  line.setAttribute("points", rates.map((rate, at) => `${shift + at},${(19 - (18 * rate) / top).toFixed(1)}`).join(" "));
  picture.append(line);
  return picture;
}

function duration(seconds) {
  if (seconds < 0) return "–";
  return seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(1)} s`;
}
