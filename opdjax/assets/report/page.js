// Shows the numbers of a token, from the table below its rollout: on hover, on tap and with the arrow keys.
const tip = Object.assign(document.createElement("dl"), { id: "tip", role: "status", hidden: true });
document.body.append(tip);
const copy = (name, cell) => Object.assign(document.createElement(name), { textContent: cell.textContent });

function show({ target }) {
  if (tip.contains(target)) return;
  const token = target.closest(".completion .t"), table = token?.closest(".rollout").querySelector("table");
  tip.hidden = !table;
  if (!table) return;
  const { cells } = table.tBodies[0].rows[[...token.parentNode.children].indexOf(token)];
  tip.replaceChildren(...[...cells].flatMap((cell, at) => [copy("dt", table.tHead.rows[0].cells[at]), copy("dd", cell)]));
  const box = token.getClientRects()[0];
  tip.style.left = Math.max(12, Math.min(scrollX + box.left, document.documentElement.clientWidth - tip.offsetWidth - 12)) + "px";
  tip.style.top = scrollY + box.bottom + 8 + "px";
}

document.querySelectorAll(".completion .t[title]").forEach((token) => token.removeAttribute("title"));
for (const name of ["pointerover", "focusin", "click"]) document.addEventListener(name, show);
document.addEventListener("keydown", ({ key, target }) => {
  if (key === "Escape") tip.hidden = true;
  const next = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[key];
  if (target.matches(".completion .t")) target[next]?.focus();
});
