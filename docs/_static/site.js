// Figures and pictures of a page open at full size: a tap shows one over the page, another tap or Escape closes it.
document.addEventListener("DOMContentLoaded", () => {
  const overlay = document.createElement("dialog");
  overlay.className = "enlarged";
  overlay.addEventListener("click", () => overlay.close());
  document.body.append(overlay);
  for (const image of document.querySelectorAll(".bd-article img")) {
    if (image.closest("a, .sphx-glr-thumbcontainer")) continue;
    image.classList.add("enlargeable");
    image.addEventListener("click", () => {
      const copy = image.cloneNode();
      copy.removeAttribute("width");
      copy.removeAttribute("style");
      overlay.replaceChildren(copy);
      overlay.showModal();
    });
  }
  // Tables and formulas that are wider than the page can be moved: a shadow at the edge shows it, and the keyboard reaches them.
  const boxes = document.querySelectorAll(".pst-scrollable-table-container, .bd-article .formula, .bd-article .highlight pre");
  const measure = () => {
    for (const box of boxes) {
      const wide = box.scrollWidth > box.clientWidth + 2;
      box.classList.toggle("wide", wide);
      box.classList.toggle("at-end", wide && box.scrollLeft + box.clientWidth >= box.scrollWidth - 2);
      if (wide) box.tabIndex = 0;
    }
  };
  for (const box of boxes) box.addEventListener("scroll", measure, { passive: true });
  window.addEventListener("resize", measure);
  measure();
});
