// The student that the first screen shows. Without JavaScript, and on paper, all are shown.
const choices = [...document.querySelectorAll(".students button")];
const choose = (chosen) => choices.forEach((button) => {
  button.setAttribute("aria-pressed", button === chosen);
  document.getElementById(button.dataset.headline).hidden = button !== chosen;
});
choices.forEach((button) => button.addEventListener("click", () => choose(button)));
if (choices.length) choose(choices[0]);

// Legends hide and show a model in the charts of their section.
document.querySelectorAll("button[data-model]").forEach((button) => button.addEventListener("click", () => {
  const shown = button.getAttribute("aria-pressed") === "false";
  button.setAttribute("aria-pressed", shown);
  button.closest("section").querySelectorAll("g[data-model]").forEach((line) => {
    if (line.dataset.model === button.dataset.model) line.classList.toggle("off", !shown);
  });
}));

// Tooltips for mouse and touch. Without JavaScript, the browser shows the <title> of a point.
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
const show = (event) => {
  const box = event.currentTarget.getBoundingClientRect();
  tip.textContent = event.currentTarget.dataset.tip;
  tip.hidden = false;
  const left = Math.min(box.right + 4, document.documentElement.clientWidth - tip.offsetWidth - 4);
  tip.style.left = `${Math.max(4, left) + scrollX}px`;
  tip.style.top = `${box.top + scrollY - tip.offsetHeight - 2}px`;
};
const hide = () => { tip.hidden = true; };
document.querySelectorAll("svg title").forEach((title) => {
  const point = title.parentNode;
  point.dataset.tip = title.textContent;
  title.remove();
  point.addEventListener("pointerenter", show);
  point.addEventListener("pointerleave", hide);
});

// Paper shows folded tables.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open], .listing)")];
  opened.forEach((part) => { part.open = true; });
});
addEventListener("afterprint", () => opened.forEach((part) => { part.open = false; }));
