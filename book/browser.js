// Runs in an opened page (see browser.py) and returns a sentence for each thing that a reader would stumble over.
// A width that fits may be 1 px over by rounding.
() => {
  const found = new Set();
  const article = document.querySelector(".bd-article") || document.body;
  const root = document.documentElement;
  const seen = (e) => e.checkVisibility({ visibilityProperty: true });
  const name = (e) => (e.alt || e.textContent || e.outerHTML).trim().replace(/\s+/g, " ").slice(0, 60);

  if (root.scrollWidth > root.clientWidth + 1)
    found.add(`the page scrolls sideways: ${root.scrollWidth} px in ${root.clientWidth}`);
  for (const e of article.querySelectorAll("pre"))
    if (seen(e) && e.scrollWidth > e.clientWidth + 1)
      found.add(`code scrolls sideways (${e.scrollWidth} px in ${e.clientWidth}): ${name(e)}`);

  for (const e of article.querySelectorAll(".math"))
    if (!e.querySelector("mjx-container")) found.add(`mathematics is not typeset: ${name(e)}`);
  for (const e of article.querySelectorAll("mjx-merror, [data-mjx-error]"))
    found.add(`mathematics has an error: ${e.getAttribute("data-mjx-error") || name(e)}`);

  for (const e of article.querySelectorAll("img")) {
    if (!(e.alt || "").trim()) found.add(`a picture has no alt text: ${e.src.slice(-60)}`);
    if (!e.complete || !e.naturalWidth) found.add(`a picture does not load: ${name(e)}`);
    if (!seen(e)) continue; // a frame of a stepper that is not shown, or folded away
    if (e.getBoundingClientRect().right > root.clientWidth + 1) found.add(`a picture is cut: ${name(e)}`);
    const words =
      e.closest("figure")?.querySelector("figcaption") ||
      e.closest("[data-stepper]")?.querySelector(".words") ||
      e.closest(".sd-card")?.querySelector("p");
    if (!words || !seen(words) || !words.textContent.trim()) found.add(`a picture has no caption: ${name(e)}`);
  }

  // Contrast of text and ground as WCAG 2 defines it; below 3 it cannot be read, pale greys lie above.
  const numbers = (colour) => (colour.match(/[\d.]+/g) || []).map(Number);
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const luminance = (colour) => {
    const [r, g, b] = numbers(colour).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const clear = (e) => (numbers(getComputedStyle(e).backgroundColor)[3] ?? 1) === 0;
  const text = "p, li, td, th, figcaption, pre span, summary, .words, .label, button, h1, h2, h3";
  for (const e of article.querySelectorAll(text)) {
    if (!seen(e) || ![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    let ground = e;
    while (ground.parentElement && clear(ground)) ground = ground.parentElement;
    const pair = [getComputedStyle(e).color, getComputedStyle(ground).backgroundColor].map(luminance);
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < 3) found.add(`text cannot be read on its ground (contrast ${ratio.toFixed(1)}): ${name(e)}`);
  }
  return [...found];
}
