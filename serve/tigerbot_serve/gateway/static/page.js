// The page: what was asked so far, the controls, and one question at a time. What is kept in the browser: the language,
// the heat map's layers, and the API key only while its box is ticked.

import { chat } from "./api.js";
import { watchTokens } from "./heat.js";
import { LivePanel } from "./live.js";
import { loadStrings, otherLanguage, speak, t } from "./strings.js";
import { Turn } from "./turn.js";

const MODEL = document.querySelector('meta[name="model"]')?.content || "tiger";
const LAYERS = ["dev", "div", "gated"];
const $ = (id) => document.getElementById(id);

let history = []; // messages of the exchanges that ended well
let asking = null; // the AbortController of the answer under way

async function main() {
  await loadStrings();
  keepKey();
  layers();
  dial();
  watchTokens($("turns"), $("tip"));
  new LivePanel($("live"), $("show-live"), key);
  disclose("show-settings", "settings");
  $("fresh").addEventListener("click", fresh);
  $("stop").addEventListener("click", stop);
  $("language").addEventListener("click", () => { otherLanguage(); words(); });
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  $("message").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
  words();
  document.body.classList.add("ready");
}

function submit() {
  const question = $("message").value.trim();
  if (!question || asking) return;
  $("message").value = "";
  ask(question);
}

async function ask(question) {
  const messages = [...history, { role: "user", content: question }];
  const system = $("system").value.trim();
  const wanted = { dial: Number($("dial").value), compare: $("compare").checked, verify: $("verify").checked };
  const turn = new Turn(question, wanted);
  $("intro").hidden = true;
  $("turns").append(turn.node);
  asking = new AbortController();
  const own = asking;
  busy(true);
  const body = {
    model: MODEL,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    creativity: wanted.dial,
    verify: wanted.verify,
    max_rewrites: Number($("rewrites").value),
    stream: true,
    ensemble_tokens: true,
  };
  if (wanted.compare) body.compare = true;
  if ($("limit").value) body.max_tokens = Number($("limit").value);
  try {
    for await (const chunk of chat(body, { key: key(), signal: own.signal })) {
      if (!own.signal.aborted) take(turn, chunk);
    }
    if (!own.signal.aborted) ended(turn, messages);
  } catch (error) {
    if (own.signal.aborted) turn.cancelled();
    else failed(turn, error, question);
  } finally {
    if (asking === own) {
      asking = null;
      busy(false);
    }
  }
}

function take(turn, chunk) {
  const low = scrollY + innerHeight > document.body.scrollHeight - 80;
  turn.take(chunk);
  const phase = chunk.ensemble?.phase;
  if (phase) say(turn.main.status.querySelector("[aria-current]")?.textContent);
  if (low) requestAnimationFrame(() => scrollTo({ top: document.body.scrollHeight }));
}

function ended(turn, messages) {
  const badge = turn.main.status.querySelector(".badge")?.textContent || "";
  say(t("done", { text: turn.main.text, verdict: badge }));
  history = [...messages, { role: "assistant", content: turn.main.text }];
}

function failed(turn, error, question) {
  turn.failed(error, () => { if (!asking) ask(question); });
  if (error.status === 401 && $("settings").hidden) $("show-settings").click();
  if (error.status === 401) $("key").focus();
  if (!$("message").value && error.status !== 429) $("message").value = question;
}

function stop() {
  if (!asking) return;
  asking.abort();
  say(t("cancelled"));
}

function fresh() {
  stop();
  history = [];
  $("turns").replaceChildren();
  $("intro").hidden = false;
  $("message").focus();
}

function busy(now) {
  const focused = document.activeElement === (now ? $("send") : $("stop"));
  $("send").hidden = now;
  $("stop").hidden = !now;
  $("turns").setAttribute("aria-busy", String(now));
  if (focused) (now ? $("stop") : $("message")).focus();
}

function words() {
  speak();
  $("language").textContent = t("other_language");
  $("language").lang = t("other_language") === "English" ? "en" : "zh-Hans";
  $("dial").dispatchEvent(new Event("input"));
}

function say(text) {
  $("said").textContent = text || "";
}

function dial() {
  $("dial").addEventListener("input", () => {
    const value = Number($("dial").value).toFixed(2);
    $("shown").textContent = value;
    $("dial").setAttribute("aria-valuetext", t("dial_value", { value }));
  });
}

function layers() {
  const draw = () => {
    const on = $("heat").getAttribute("aria-pressed") === "true";
    document.body.classList.toggle("heat", on);
    for (const name of LAYERS) document.body.classList.toggle(name, on && $(`layer-${name}`).checked);
    $("legend").hidden = !on;
    localStorage.setItem("tiger.layers", JSON.stringify([on, ...LAYERS.map((name) => $(`layer-${name}`).checked)]));
  };
  const [on = true, ...kept] = JSON.parse(localStorage.getItem("tiger.layers")) || [];
  $("heat").setAttribute("aria-pressed", String(on));
  LAYERS.forEach((name, at) => { $(`layer-${name}`).checked = kept[at] ?? true; });
  $("heat").addEventListener("click", () => {
    $("heat").setAttribute("aria-pressed", String($("heat").getAttribute("aria-pressed") !== "true"));
    draw();
  });
  for (const name of LAYERS) $(`layer-${name}`).addEventListener("change", draw);
  draw();
}

function key() {
  return $("key").value.trim();
}

function keepKey() {
  $("key").value = localStorage.getItem("tiger.key") || "";
  $("remember").checked = Boolean($("key").value);
  const keep = () => {
    if ($("remember").checked && key()) localStorage.setItem("tiger.key", key());
    else localStorage.removeItem("tiger.key");
  };
  for (const name of ["key", "remember"]) $(name).addEventListener("change", keep);
}

function disclose(button, panel) {
  $(button).addEventListener("click", () => {
    $(panel).hidden = !$(panel).hidden;
    $(button).setAttribute("aria-expanded", String(!$(panel).hidden));
  });
}

main();
