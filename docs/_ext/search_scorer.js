// Scores of the search: essays first, then tutorials, then the API; an exact name of the API before all.
var Scorer = {
  score: ([docname, title, anchor, description, score, file, kind]) => {
    const last = ["changelog", "index", "references", "deviations"].includes(docname) || docname.startsWith("decisions/");
    if (last) return score - 20;
    if (docname.startsWith("tutorials/")) return score + 15;
    if (docname.startsWith("api/")) return score;
    return score + 30;
  },
  objNameMatch: 50,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
