"""The look of a sweep's page, light and dark, and its two dozen lines of script: language and copy button."""

STYLE = """
:root{--ours:#12876f;--deep:#0b5c4b;--random:#7c8a99;--band:#7c8a9938;--epoch:#8d5bb0;--fresh:#d55e00;--blue:#2f6fb0;
--p1:#9aa7b4;--p2:#6fa8d6;--p3:#2f6fb0;--p4:#12876f;--best:#d55e00;--dot:#2f6fb066}
@media(prefers-color-scheme:dark){:root{--ours:#35b899;--deep:#7fe0c8;--random:#8b99a6;--band:#8b99a633;--epoch:#b78ad6;
--fresh:#f08a3c;--blue:#6aa9e6;--p1:#5c6a77;--p2:#3f6f9c;--p3:#6aa9e6;--p4:#35b899;--best:#f08a3c;--dot:#6aa9e666}}
.top{display:flex;justify-content:space-between;align-items:flex-start;gap:1rem} .top h1{overflow-wrap:anywhere}
.switch{font-size:.85rem;color:var(--soft);cursor:pointer;user-select:none;display:inline-block;margin:.2rem 0}
.language{border:1px solid var(--line);border-radius:1rem;padding:.15rem .8rem;background:var(--card);white-space:nowrap}
#zh{position:absolute;opacity:0;pointer-events:none} #zh:focus-visible~.language,button:focus-visible{outline:2px solid var(--blue)}
body:has(#zh:checked) .en{display:none} body:not(:has(#zh:checked)) .zh{display:none}
nav{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.9rem;margin:.6rem 0 0} nav a{color:var(--blue);text-decoration:none}
nav a:hover{text-decoration:underline} section{scroll-margin-top:1rem}
figure{background:var(--card);border:1px solid var(--line);border-radius:.7rem;padding:.8rem 1rem;margin:.6rem 0}
figure{overflow-x:auto} figure>svg{min-width:42rem} figcaption{font-size:.85rem;margin-top:.5rem} figure .keys{margin-top:0}
details{margin:.5rem 0} summary{cursor:pointer;color:var(--blue);font-size:.9rem} .scroll{overflow-x:auto} details .scroll{max-height:32rem;overflow-y:auto}
.scroll td,.scroll th{font-size:.87rem} th{font-weight:600;white-space:nowrap} code{font-size:.84em;overflow-wrap:anywhere}
.callout{background:var(--card);border:1px solid var(--line);border-left:4px solid var(--fresh);border-radius:.4rem;padding:.6rem .9rem}
.advice{padding-left:1.3rem;margin:.4rem 0} .advice li{margin:.35rem 0}
.spec{position:relative} .spec pre{background:var(--card);border:1px solid var(--line);border-radius:.7rem;padding:.9rem 1rem;
overflow:auto;max-height:30rem;font-size:.84rem;line-height:1.5;margin:.6rem 0}
.spec button{position:absolute;right:.7rem;top:.6rem;font:inherit;font-size:.82rem;color:var(--ink);background:var(--paper);
border:1px solid var(--line);border-radius:.4rem;padding:.2rem .7rem;cursor:pointer} .spec button .said{display:none}
.spec button.copied .ask{display:none} .spec button.copied .said{display:inline;color:var(--ours)}
.slices{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:.7rem} .slices svg{background:var(--card);
border:1px solid var(--line);border-radius:.6rem;padding:.3rem;box-sizing:border-box}
svg .name{font-size:12px} svg .strong{fill:var(--ink);font-weight:600} svg .tick,svg .axis{stroke:var(--soft)} svg .axis{stroke-opacity:.6}
svg .halo{paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round;fill:var(--soft);font-size:10px}
svg .edged{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round} svg path{fill:none} .band{fill:var(--band)!important} .line{stroke-width:2} .line.ours{stroke:var(--ours);stroke-width:2.6;stroke-linejoin:round}
.line.random{stroke:var(--random);stroke-dasharray:6 4} svg .epoch{fill:var(--epoch)} circle.ours{fill:var(--ours)}
line.fresh{stroke:var(--fresh);stroke-width:1.6;stroke-dasharray:2 4;stroke-linecap:round}
.dots{stroke-linecap:round;stroke-width:4.4} .dots.rest{stroke:var(--dot)} .dots.top{stroke:var(--ours);stroke-width:5}
.ring{fill:none;stroke:var(--best);stroke-width:2.2} .hollow{fill:var(--card);stroke:var(--soft);stroke-width:1.8}
.interval{stroke:var(--ours);stroke-width:4;stroke-opacity:.4;stroke-linecap:round} line.speck{stroke:var(--ours);stroke-opacity:.75}
.curse{stroke:var(--fresh);stroke-width:1.4;stroke-dasharray:3 3} rect.fanova{fill:var(--blue)} rect.ped{fill:var(--ours)}
.whisker{stroke:var(--ink);stroke-opacity:.7;stroke-width:1.2}
.trial{stroke:var(--p1);stroke-width:1;stroke-linejoin:round;stroke-opacity:.13} .trial.p2{stroke:var(--p2);stroke-opacity:.22} .trial.p3{stroke:var(--p3);
stroke-opacity:.38} .trial.p4{stroke:var(--p4);stroke-width:1.4;stroke-opacity:.85} .trial.best{stroke:var(--best);stroke-width:3}
.trial.one{stroke-opacity:.85}.trial.best{stroke-opacity:1}svg.sparse .trial{stroke-opacity:.75}.trial.one:hover{stroke:var(--best);stroke-width:3.5;stroke-opacity:1} figure:has(.few:checked) .p1,figure:has(.few:checked) .p2{display:none}
.member{stroke-width:6;stroke-linecap:butt} .taken{stroke:var(--soft);stroke-opacity:.55} .way{stroke:var(--ink);stroke-width:2.2;stroke-linecap:round}
.f0{stroke:#0072b2}.f1{stroke:#d55e00}.f2{stroke:#009e73}.f3{stroke:#cc79a7}.f4{stroke:#56b4e9}.f5{stroke:#e69f00}.f6{stroke:#8d5bb0}.f7{stroke:#8fb93f}
i.mark{display:inline-block;width:.8rem;height:.8rem;border-radius:.2rem;margin-right:.45rem;vertical-align:-1px}
i.ours,i.p4,i.ped,i.top{background:var(--ours)} i.random{background:var(--band);border:1px dashed var(--random);box-sizing:border-box}
i.epoch{background:var(--epoch);transform:rotate(45deg) scale(.75);border-radius:0} i.fresh{height:0!important;border-top:2px dotted var(--fresh);
vertical-align:4px!important;width:1.1rem!important} i.hollow{border:2px solid var(--soft);box-sizing:border-box;border-radius:50%}
i.speck{width:2px!important;background:var(--ours)} i.fanova,i.p3{background:var(--blue)} i.best{background:var(--best)} i.p2{background:var(--p2)}
i.p1{background:var(--p1)} i.rest{background:var(--dot)}
.fates{display:flex;height:1.9rem;border-radius:.4rem;overflow:hidden;margin:.6rem 0} .fates i{min-width:1px}
.fate-done{background:#12876f}.fate-taken-over{background:#8fb93f}.fate-stopped{background:#2f6fb0}.fate-fresh-seeds{background:#8d5bb0}
.fate-failed{background:#c0392b}.fate-killed{background:#7d2b4d}.fate-retried{background:#d55e00}.fate-cut-short{background:#e0a100}
.fate-running{background:#56b4e9}.fate-other{background:#66727e}
@media print{.spec button,.switch,nav{display:none} figure{break-inside:avoid} .scroll{max-height:none}}
"""

SCRIPT = """
const zh = document.getElementById("zh");
const told = () => { document.documentElement.lang = zh.checked ? "zh" : "en"; };
if ((navigator.language || "").startsWith("zh")) zh.checked = true;
zh.addEventListener("change", told);
told();
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(text.textContent);
    } catch {
      const range = document.createRange();
      range.selectNodeContents(text);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      document.execCommand("copy");
    }
    button.classList.add("copied");
    setTimeout(() => button.classList.remove("copied"), 1600);
  });
}
"""
