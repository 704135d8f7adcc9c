// Shows the numbers of a token beside it: on hover, on tap and with the arrow keys. They come from the table below the rollout.
const tip = document.body.appendChild(document.createElement("dl"));
tip.id = "tip";
tip.role = "status";
tip.hidden = true;
const tokens = [...document.querySelectorAll(".completion .t[title]")];
const copy = (name, cell) => Object.assign(document.createElement(name), { textContent: cell.textContent });

function show(event) {
  if (tip.contains(event.target)) return;
  const token = event.target.closest(".completion .t");
  const table = token && token.closest(".rollout").querySelector("table");
  tip.hidden = !table;
  if (!table) return;
  const { cells } = table.tBodies[0].rows[[...token.parentNode.children].indexOf(token)];
  const names = table.tHead.rows[0].cells;
  tip.replaceChildren(...[...cells].flatMap((cell, at) => [copy("dt", names[at]), copy("dd", cell)]));
  const box = token.getClientRects()[0], right = document.documentElement.clientWidth - tip.offsetWidth - 12;
  tip.style.left = window.scrollX + Math.max(12, Math.min(box.left, right)) + "px";
  tip.style.top = window.scrollY + box.bottom + 8 + "px";
}

tokens.forEach((token) => token.removeAttribute("title"));
for (const name of ["pointerover", "focusin", "click"]) document.addEventListener(name, show);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") tip.hidden = true;
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const next = step && tokens[tokens.indexOf(event.target) + step];
  if (next && next.parentNode === event.target.parentNode) next.focus();
});
