// Shows the numbers of a token beside it: on hover, on tap and with the arrow keys. They come from the table below the rollout.
(function () {
  "use strict";
  var tip = document.createElement("div");
  tip.id = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  document.body.appendChild(tip);

  function tokensOf(token) {
    return Array.prototype.slice.call(token.parentNode.querySelectorAll(".t"));
  }

  function hide() {
    tip.hidden = true;
    document.querySelectorAll(".t.shown").forEach(function (token) { token.classList.remove("shown"); });
  }

  function show(token) {
    var rollout = token.closest(".rollout");
    var table = rollout && rollout.querySelector("table");
    if (!table) return;
    hide();
    var names = table.querySelectorAll("thead th");
    var cells = table.querySelectorAll("tbody tr")[tokensOf(token).indexOf(token)].children;
    var list = document.createElement("dl");
    for (var i = 0; i < cells.length; i++) {
      var name = document.createElement("dt"), value = document.createElement("dd");
      name.textContent = names[i].textContent;
      value.textContent = cells[i].textContent;
      list.appendChild(name);
      list.appendChild(value);
    }
    tip.replaceChildren(list);
    tip.hidden = false;
    token.classList.add("shown");
    var box = token.getClientRects()[0], own = tip.getBoundingClientRect();
    var left = Math.min(box.left, document.documentElement.clientWidth - own.width - 12);
    var below = box.bottom + 8 + own.height < window.innerHeight || box.top < own.height + 16;
    tip.style.left = window.scrollX + Math.max(12, left) + "px";
    tip.style.top = window.scrollY + (below ? box.bottom + 8 : box.top - own.height - 8) + "px";
  }

  document.querySelectorAll(".completion .t[title]").forEach(function (token) { token.removeAttribute("title"); });
  document.addEventListener("pointerover", function (event) {
    var token = event.target.closest && event.target.closest(".completion .t");
    if (token) show(token); else if (!tip.contains(event.target)) hide();
  });
  document.addEventListener("focusin", function (event) {
    if (event.target.matches(".completion .t")) show(event.target); else hide();
  });
  document.addEventListener("click", function (event) {
    var token = event.target.closest(".completion .t");
    if (token) show(token);
  });
  document.addEventListener("keydown", function (event) {
    if (event.key === "Escape") return hide();
    var step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !event.target.matches(".completion .t")) return;
    var all = tokensOf(event.target), next = all[all.indexOf(event.target) + step];
    if (next) { event.preventDefault(); next.focus(); }
  });
})();
