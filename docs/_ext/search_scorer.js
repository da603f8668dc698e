// Scores of the search: essays first, those whose title has the words before others; then tutorials, then the API.
// A name of the API that is typed exactly comes before all.
var Scorer = (() => {
  const query = (new URLSearchParams(window.location.search).get("q") || "").trim();
  const words = query.toLowerCase().split(/\s+/).filter((word) => word.length > 2);
  const stem = (word) => word.replace(/(ions?|ers?|ing|ies|s)$/, "");
  const LAST = ["changelog", "index", "references", "deviations"];
  const REFERENCE = ["architecture", "data", "gpu", "record-format"];

  const score = ([docname, title, anchor, description, score, file, kind]) => {
    if (kind === "object") {
      const exact = title === query || title.endsWith(`.${query}`);
      return exact && /[A-Z_.]/.test(query) ? score + 100 - title.split(".").length : score;
    }
    const page = title.split(" > ")[0].toLowerCase();
    const named = words.length > 0 && words.every((word) => page.includes(stem(word))) ? 20 : 0;
    if (LAST.includes(docname) || docname.startsWith("decisions/")) return score - 20;
    if (docname.startsWith("api/")) return score;
    if (docname.startsWith("tutorials/")) return score + 15 + named / 2;
    return score + (REFERENCE.includes(docname) ? 20 : 30) + named - (anchor ? 4 : 0);
  };

  return {
    score,
    objNameMatch: 11,
    objPartialMatch: 6,
    objPrio: { 0: 15, 1: 5, 2: -5 },
    objPrioDefault: 0,
    title: 15,
    partialTitle: 7,
    term: 5,
    partialTerm: 2,
  };
})();
