// The browser of trajectories. Its whole state is in the address: #eval=after&verdict=wrong&kind=two_hop

const LABELS = { before: "Before training", after: "After training" };
const NAMES = DATA.evaluations;
const DEFAULTS = { eval: NAMES.includes("after") ? "after" : NAMES.at(-1) || "", verdict: "", kind: "", stop: "", text: "", id: "" };
let state = { ...DEFAULTS };
let shown = [];

// ---- what a turn says -------------------------------------------------------------------------

// "<think>a</think><search>b" -> [{tag: "think", body: "a", closed: true}, {tag: "search", body: "b", closed: false}]
// Text outside of any tag has tag "". A tag that is never closed ends at the next one that opens.
function parseTurn(text) {
  const tags = Object.keys(DATA.tags).join("|");
  const pattern = new RegExp(`<(${tags})>([\\s\\S]*?)(</\\1>|(?=<(?:${tags})>)|$)`, "g");
  const parts = [];
  const thought = text.indexOf("</think>");
  if (thought >= 0 && !text.slice(0, thought).includes("<think>")) text = "<think>" + text; // begun by the prompt
  let end = 0;
  const plain = (from, to) => {
    const body = text.slice(from, to).trim();
    if (body) parts.push({ tag: "", body, closed: true });
  };
  for (const match of text.matchAll(pattern)) {
    plain(end, match.index);
    parts.push({ tag: match[1], body: match[2].trim(), closed: match[3] !== "" });
    end = match.index + match[0].length;
  }
  plain(end, text.length);
  return parts;
}

function block(name, label, ...content) {
  return el("div", { class: `block ${name}` }, el("span", { class: "label" }, label), el("div", { class: "body" }, ...content));
}

function turnBlocks(text, right) {
  return parseTurn(text).map(({ tag, body, closed }) => {
    const open = closed ? "" : " (never closed)";
    const label = DATA.tags[tag];
    if (!label) return block("plain", "other text", body);
    if (label === "thought") return block("think", label + open, body);
    if (label === "answer") return block(`answer ${right ? "right" : "wrong"}`, label + open, body || "(empty)");
    return block("search", label + open, body || "(empty)");
  });
}

function hitList(search) {
  if (search.error) return block("error", "search failed", search.query, el("br"), search.error);
  if (!search.hits.length) return block("passages", "passages", "(nothing found)");
  const hits = search.hits.map(([place, score], i) => {
    const [id, title, text, picture] = DATA.passages[place];
    return el("details", { open: search.hits.length === 1 },
      el("summary", {}, el("span", { class: "rank" }, `${i + 1}`), el("span", { class: "title" }, title || id),
        el("span", { class: "score", title: `score; passage ${id}` }, formatNumber(score))),
      picture && el("img", { src: picture, alt: "" }), el("p", {}, text));
  });
  return block("passages", "passages", ...hits);
}

function runColumn(name, question, run) {
  const head = el("header", {}, el("h4", {}, LABELS[name] || name));
  if (!run) return el("section", { class: "run" }, head, el("p", { class: "empty" }, "Not in this evaluation."));
  const right = run.right;
  const searches = run.parts.filter(([kind]) => kind === "search").length;
  const facts = [`${searches} ${searches === 1 ? "search" : "searches"}`, run.stop_reason.replaceAll("_", " "),
    run.valid_format ? "valid format" : "invalid format", `F1 ${run.f1.toFixed(2)}`];
  if (run.judged) facts.push(`judge: ${run.judged.replaceAll("_", " ")}`);
  head.append(el("span", { class: `verdict ${right ? "right" : "wrong"}` }, right ? "right" : "wrong"),
    el("p", { class: "facts" }, facts.join(" · ")));
  const blocks = run.parts.map(([kind, content]) => {
    if (kind === "policy") return turnBlocks(content, right);
    if (kind === "search") return hitList(content);
    return block("message", "told by the protocol", DATA.texts[content].trim());
  });
  if (run.answer === null) blocks.push(block("answer none", "answer", "none given"));
  const prompt = run.prompt === null ? "" : DATA.texts[run.prompt].replaceAll("{question}", question.text);
  return el("section", { class: "run", "data-eval": name }, head, ...blocks.flat(),
    prompt && el("details", { class: "prompt" }, el("summary", {}, "prompt"), el("pre", {}, prompt)));
}

// ---- which questions are shown -----------------------------------------------------------------

function place() {
  return Math.max(0, NAMES.indexOf(state.eval));
}

const VERDICTS = {
  right: ([, run]) => run.right,
  wrong: ([, run]) => !run.right,
  fixed: ([first, run]) => first && !first.right && run.right,
  broken: ([first, run]) => first && first.right && !run.right,
};

function haystack(question) {
  question.haystack ??= [question.id, question.text, ...question.gold, ...question.runs.filter(Boolean).flatMap((run) =>
    [run.answer || "", ...run.parts.flatMap(([kind, content]) =>
      kind === "policy" ? [content] : kind === "search" ? content.hits.map(([p]) => DATA.passages[p][1]) : [])])]
    .join("\n").toLowerCase();
  return question.haystack;
}

function matches(question) {
  const run = question.runs[place()];
  return run !== null
    && (!VERDICTS[state.verdict] || VERDICTS[state.verdict]([question.runs[0], run]))
    && (!state.kind || question.kind === state.kind)
    && (!state.stop || run.stop_reason === state.stop)
    && (!state.text || haystack(question).includes(state.text.toLowerCase()));
}

function marks(question) {
  return question.runs.map((run, i) => el("span", {
    class: `mark ${run === null ? "none" : run.right ? "right" : "wrong"}`,
    title: `${LABELS[NAMES[i]] || NAMES[i]}: ${run === null ? "not evaluated" : run.right ? "right" : "wrong"}`,
  }, run === null ? "·" : run.right ? "✓" : "✗"));
}

function renderList() {
  shown = DATA.questions.filter(matches);
  if (!shown.some((q) => q.id === state.id)) state.id = shown.length ? shown[0].id : "";
  byId("list").replaceChildren(...shown.map((question, i) => {
    const row = el("div", { class: "row", role: "option", id: `row-${i}`, "data-id": question.id },
      el("span", { class: "marks" }, marks(question)), el("span", { class: "question" }, question.text),
      el("span", { class: "kind" }, question.kind.replaceAll("_", "-")));
    row.addEventListener("click", () => select(i));
    return row;
  }));
  if (!shown.length) byId("list").append(el("p", { class: "empty" }, "No trajectory matches these filters."));
  const left = DATA.left_out ? ` (${DATA.left_out.toLocaleString("en")} more are not in this page)` : "";
  byId("count").textContent = `${shown.length.toLocaleString("en")} of ${DATA.questions.length.toLocaleString("en")} questions${left}`;
  renderDetail();
}

function renderDetail() {
  const at = shown.findIndex((question) => question.id === state.id);
  document.querySelectorAll("#list .row").forEach((row, i) => row.setAttribute("aria-selected", String(i === at)));
  const detail = byId("detail");
  byId("list").setAttribute("aria-activedescendant", at < 0 ? "" : `row-${at}`);
  if (at < 0) return detail.replaceChildren(el("p", { class: "empty" }, "Nothing to show."));
  const question = shown[at];
  detail.replaceChildren(
    el("p", { class: "eyebrow" }, `${question.kind.replaceAll("_", "-")} · ${question.id}`),
    el("h3", {}, question.text),
    el("p", { class: "gold" }, el("span", { class: "label" }, "expected"), question.gold.join("  or  ")),
    el("div", { class: "runs" }, question.runs.map((run, i) => runColumn(NAMES[i], question, run))));
}

// Scrolls the list alone: scrollIntoView would move the whole page when it opens.
function reveal() {
  const row = document.querySelector('#list .row[aria-selected="true"]'), list = byId("list");
  if (!row) return;
  const top = row.offsetTop - list.offsetTop;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + row.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top + row.offsetHeight - list.clientHeight;
}

function select(at) {
  if (at < 0 || at >= shown.length) return;
  state.id = shown[at].id;
  renderDetail();
  reveal();
  writeHash();
}

// ---- filters and the address -------------------------------------------------------------------

function writeHash() {
  const changed = Object.entries(state).filter(([key, value]) => value && value !== DEFAULTS[key]);
  history.replaceState(null, "", "#" + new URLSearchParams(changed));
}

function readHash() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  state = { ...DEFAULTS };
  for (const key of Object.keys(DEFAULTS)) if (key in given) state[key] = given[key];
  if (!NAMES.includes(state.eval)) state.eval = DEFAULTS.eval;
  for (const field of byId("filters").elements) if (field.name) field.value = state[field.name];
  renderList();
  reveal();
}

function choice(name, label, options) {
  const nodes = options.map(([value, text]) => el("option", { value }, text));
  return el("label", {}, el("span", {}, label), el("select", { name }, nodes));
}

function distinct(values) {
  return [...new Set(values)].sort().map((value) => [value, value.replaceAll("_", " ")]);
}

function buildFilters() {
  const runs = DATA.questions.flatMap((question) => question.runs.filter(Boolean));
  const verdicts = [["", "all"], ["right", "right"], ["wrong", "wrong"]];
  if (NAMES.length > 1) verdicts.push(["fixed", `fixed (wrong ${NAMES[0]}, now right)`], ["broken", `broken (right ${NAMES[0]}, now wrong)`]);
  byId("filters").append(
    choice("eval", "evaluation", NAMES.map((name) => [name, LABELS[name] || name])),
    choice("verdict", "verdict", verdicts),
    choice("kind", "kind", [["", "all"], ...distinct(DATA.questions.map((question) => question.kind))]),
    choice("stop", "stop reason", [["", "all"], ...distinct(runs.map((run) => run.stop_reason))]),
    el("label", { class: "grow" }, el("span", {}, "text"), el("input", { name: "text", type: "search", placeholder: "question, thought, query, answer, title" })),
    el("output", { id: "count" }));
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("input", (event) => {
    state[event.target.name] = event.target.value;
    renderList();
    reveal();
    writeHash();
  });
}

function onKey(event) {
  const move = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
  const elsewhere = event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey;
  if (!move || elsewhere || (event.target === document.body && !browserInView())) return;
  event.preventDefault();
  select(shown.findIndex((question) => question.id === state.id) + move);
  if (event.target !== document.body) byId("list").focus({ preventScroll: true }); // what had it may be gone
}

function browserInView() {
  const box = byId("list").getBoundingClientRect();
  return box.top < innerHeight && box.bottom > 0;
}

byId("chosen").textContent = DATA.chosen && `What this page holds: ${DATA.chosen}.`;
if (DATA.questions.length) {
  buildFilters();
  readHash();
  addEventListener("hashchange", readHash);
  addEventListener("keydown", onKey);
} else {
  byId("browser").replaceChildren(el("h2", {}, "Trajectories"), el("p", { class: "empty" }, "No trajectories yet."));
}
