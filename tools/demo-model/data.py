"""Pairs, the held-out split, paraphrases by rule, and packed training rows."""
import json
import random
import re

import numpy as np
import own_pairs as own

IGNORED = -100  # label of a position without loss


def load_pairs(path):
    with open(path, encoding="utf-8") as lines:
        return [(d["user"], d["assistant"]) for d in map(json.loads, lines)]


def split(pairs, seed=0, share=0.98):
    """Training and held-out pairs. The first checkpoint was trained on exactly this split: keep it."""
    pairs = list(pairs)
    random.Random(seed).shuffle(pairs)
    cut = int(len(pairs) * share)
    return pairs[:cut], pairs[cut:]


def question_text(question):
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def answer_text(answer):
    return f"{answer}<|im_end|>\n"


# ---------------------------------------------------------------------------------------------------- paraphrases

WHAT_IS = re.compile(r"^What is (.+)\?$", re.S)
WITH_TOOL = re.compile(r"^(.*\S) \(([^()]+)\)$", re.S)

WHAT_FORMS = [
    "What is {t}?", "what is {t}", "what is {t}?", "what's {t}", "What's {t}?", "what does {t} do", "What does {t} do?", "explain {t}",
    "what is the {t} command", "What is the {t} command?", "tell me about {t}", "describe {t}", "what is {t} used for?", "{t}", "what is {t} for",
]
TOOL_FORMS = [
    "{d} ({t})", "{d} with {t}", "{d} using {t}", "{t}: {d}", "{t} {d}", "how do I {d} with {t}", "How do I {d} with {t}?", "how to {d} with {t}",
    "how to {d} using {t}", "use {t} to {d}", "{d} in {t}", "with {t}, {d}", "how can I use {t} to {d}?", "{t} command to {d}",
]
BARE_FORMS = [
    "{d}", "{d}", "{d}", "how do I {d}", "How do I {d}?", "how to {d}", "How to {d}?", "how do i {d} in linux", "how to {d} in linux", "{d} in the terminal",
    "how can I {d}?", "command to {d}", "I want to {d}", "please {d}", "{d} please", "what is the command to {d}?", "which command can {d}?", "{d} from the command line",
]

# Each group: words a person may use for one another at the start of a question.
STARTS = [
    ("show", "display", "print", "view", "list", "see"), ("list", "show", "show all", "display"), ("remove", "delete", "erase"), ("create", "make", "generate"),
    ("extract", "unpack", "decompress"), ("search for", "find", "look for"), ("download", "fetch", "get"), ("start", "run", "launch"), ("execute", "run"),
    ("stop", "end", "terminate"), ("change", "set", "modify"), ("copy", "duplicate"), ("update", "upgrade", "refresh"), ("convert", "transform", "change"),
    ("open", "edit", "view"), ("compress", "pack", "shrink"), ("check", "test", "verify"), ("build", "compile"), ("add", "append", "insert"), ("install", "set up"),
    ("rename", "move"), ("kill", "terminate", "stop"), ("connect to", "log in to", "access"), ("monitor", "watch"), ("compare", "diff"), ("count", "get the number of"),
]
SWAPS = {}
for group in STARTS:
    for word in group:
        SWAPS.setdefault(word, set()).update(w for w in group if w != word)
SWAPS = {w: sorted(s) for w, s in SWAPS.items() if w in {g[0] for g in STARTS} | {"display", "print", "view", "delete", "run", "find"}}

INSIDE = [
    (r"\bdirectory\b", "folder"), (r"\bdirectories\b", "folders"), (r"\ba specific\b", "a"), (r"\bspecified\b", "given"), (r"\bspecific\b", "given"), (r"\ba given\b", "a"),
    (r"\brepository\b", "repo"), (r"\bcurrent directory\b", "current folder"), (r"\bwithin\b", "in"), (r"\bpattern\b", "word"), (r"\barchive\b", "file"),
    (r"\bremote host\b", "server"), (r"\ball files\b", "files"), (r"\bincluding\b", "also"), (r"\binformation\b", "info"), (r"\bapplication\b", "app"), (r"\busing\b", "with"),
]
CONTEXT_ONLY = re.compile(  # make no sense without the tool's name
    r"^(use|specify|same|do not|don't|ignore|include|only|\[interactive\]|display (the )?(help|version|general help)|print (the )?(help|version)|show (the )?(help|version)"
    r"|run with|increase|limit|skip|perform|disable|enable|exclude|list (available )?(commands|subcommands)|view documentation|open|start|exit|select|apply|override|set)\b", re.I)


def lower_first(text):
    """'Extract a file' -> 'extract a file', but 'USB ...' and 'SQL ...' stay."""
    return text[0].lower() + text[1:] if len(text) > 1 and not text[1].isupper() else text


def drop_brackets(text, rng):
    short = re.sub(r"\s*\([^()]*\)", "", text).replace("[", "").replace("]", "").strip()
    return short if short and rng.random() < 0.8 else text


def swap_words(text, rng):
    low = lower_first(text)
    for n in (2, 1):
        words = low.split(" ")
        head = " ".join(words[:n]).lower()
        if head in SWAPS and len(words) > n and rng.random() < 0.4:
            low = " ".join([rng.choice(SWAPS[head])] + words[n:])
            break
    for pattern, word in INSIDE:
        if rng.random() < 0.3:
            low = re.sub(pattern, word, low)
    return low


def cut_tail(text, rng):
    """Drops a trailing clause: 'list x, sorted by y' -> 'list x'."""
    for mark in (", ", " and ", " while ", " without ", " by "):
        head = text.split(mark)[0]
        if head != text and len(head.split()) >= 3 and rng.random() < 0.2:
            return head
    return text


def typo(text, rng):
    """One light typing error inside a longer word."""
    spots = [m.start() for m in re.finditer(r"(?<=[a-z])[a-z](?=[a-z]{2})", text)]
    if not spots:
        return text
    i = rng.choice(spots)
    before, here, after = text[:i], text[i], text[i + 1 :]
    return before + rng.choice([after[0] + here + after[1:], after, here + here + after])


def finish(text, rng):
    """Case, closing mark and the rare typing error."""
    p = rng.random()
    if p < 0.25:
        text = text[0].upper() + text[1:]
    elif p < 0.35:
        text = text.lower()
    if rng.random() < 0.04:
        text = typo(text, rng)
    if rng.random() < 0.06 and text[-1].isalnum():
        text += rng.choice([".", "?", "!"])
    return text


def is_common(tool):
    if tool in COMMON:
        return True
    head, _, rest = tool.partition(" ")
    return (head == "git" and rest in own.GIT) or (head == "docker" and rest in own.DOCKER)


COMMON = set(own.COMMON)


def paraphrase(question, rng, keep=0.4):
    """The same question in other words; with probability `keep` as it stands in the corpus."""
    what = WHAT_IS.match(question)
    if what:
        if rng.random() < keep:
            return question
        text = rng.choice(WHAT_FORMS).format(t=what[1])
        return text[0].upper() + text[1:] if rng.random() < 0.2 and text != what[1] else text
    match = WITH_TOOL.match(question)
    if not match or rng.random() < keep:
        return question
    desc, tool = match.groups()
    short = cut_tail(swap_words(drop_brackets(desc, rng), rng), rng)
    bare_ok = not CONTEXT_ONLY.match(desc) and len(desc.split()) >= 3
    if bare_ok and rng.random() < (0.65 if is_common(tool) else 0.06):
        head = tool.split(" ")[0]
        if " " in tool and rng.random() < 0.6:  # 'list branches in git'
            return finish(rng.choice(TOOL_FORMS[1:]).format(d=short, t=head), rng)
        return finish(rng.choice(BARE_FORMS).format(d=short), rng)
    return finish(rng.choice(TOOL_FORMS).format(d=short, t=tool), rng)


def own_question(wordings, rng):
    """A hand-written wording, sometimes inside one of the general frames."""
    text = rng.choice(wordings)
    p = rng.random()
    if p < 0.5 or re.match(r"(what|which|who|how|where|is|are|see who)\b", text):
        pass
    elif re.match(r"(show|list|find|search|look|extract|unpack|create|make|delete|remove|copy|move|rename|go|change|print|view|display|kill|stop|start|count|compare|replace|"
                  r"download|get|fetch|check|connect|install|run|restart|add|set|sort|compress|decompress|convert|mount|unmount|open|edit|clone|commit|push|pull|merge|"
                  r"switch|stage|undo|untar|unzip|zip|sync|ping|scan|build|compile|terminate|end|force|enable|read|clear|see|use|send|generate|resize|encrypt)\b", text):
        text = rng.choice(BARE_FORMS[3:]).format(d=text)
    return finish(text, rng)


# ------------------------------------------------------------------------------------------------- training stream

class Stream:
    """Endless packed rows. Every row starts with a pair (sometimes with a system message before it) and goes on with
    other pairs, as a chat of several turns would; the last one may be cut."""

    def __init__(self, pairs, tokenizer, row, seed, own_share=0.11, chat_share=0.025, common_weight=4.0, keep=0.4):
        self.tok, self.row, self.rng = tokenizer, row, random.Random(seed)
        self.own_share, self.chat_share, self.keep = own_share, chat_share, keep
        self.pairs = pairs
        weights = np.array([self.weight(q, a, common_weight) for q, a in pairs])
        self.cumulative = np.cumsum(weights)
        self.chat = [(w.split("|"), a) for w, a in own.CHAT]
        self.intents = [(w.split("|"), a) for w, a in own.INTENTS]
        self.intent_sum = np.cumsum([2 + len(w) for w, _ in self.intents])
        self.test = {q.lower().strip("?!. ") for q, _ in own.TEST}

    @staticmethod
    def weight(question, answer, common_weight):
        """Common tools more often; their one-line descriptions, met once per page, more often still."""
        what, match = WHAT_IS.match(question), WITH_TOOL.match(question)
        if what:  # the Windows pages of curl and the like only say that PowerShell may have an alias
            return 6 * common_weight if is_common(what[1]) and not answer.startswith("In PowerShell") else 1.0
        return common_weight if match and is_common(match[2]) else 1.0

    def pick(self, cumulative):
        return int(np.searchsorted(cumulative, self.rng.random() * cumulative[-1], side="right"))

    def pair(self):
        p = self.rng.random()
        if p < self.chat_share:
            wordings, answer = self.rng.choice(self.chat)
            return finish(self.rng.choice(wordings), self.rng), answer
        if p < self.chat_share + self.own_share:
            wordings, answer = self.intents[self.pick(self.intent_sum)]
            return own_question(wordings, self.rng), answer
        question, answer = self.pairs[self.pick(self.cumulative)]
        return paraphrase(question, self.rng, self.keep), answer

    def rows(self, count):
        """ids [count, row + 1], and which of the predicted positions [count, row] belong to an answer."""
        per_row = self.row // 28 + 2
        texts, heads = [], []
        for _ in range(count):
            system = self.rng.random() < 0.06
            heads.append(f"<|im_start|>system\n{self.rng.choice(own.SYSTEM)}<|im_end|>\n" if system else "")
            for _ in range(per_row):
                question, answer = self.pair()
                while question.lower().strip("?!. ") in self.test:
                    question, answer = self.pair()
                texts += [question_text(question), answer_text(answer)]
        codes = [e.ids for e in self.tok.encode_batch(texts, add_special_tokens=False)]
        ids = np.zeros((count, self.row + 1), dtype=np.int64)
        answers = np.zeros((count, self.row + 1), dtype=bool)
        for r in range(count):
            at = 0

            def put(part, is_answer):
                nonlocal at
                part = part[: self.row + 1 - at]
                ids[r, at : at + len(part)], answers[r, at : at + len(part)] = part, is_answer
                at += len(part)

            if heads[r]:
                put(self.tok.encode(heads[r], add_special_tokens=False).ids, False)
            for i in range(2 * per_row * r, 2 * per_row * (r + 1), 2):
                put(codes[i], False)
                put(codes[i + 1], True)
        return ids, answers[:, 1:]


def flat_ids(pairs, tokenizer):
    """All pairs one after another, in the first checkpoint's format."""
    texts = [question_text(q) + answer_text(a) for q, a in pairs]
    return np.concatenate([np.array(e.ids, dtype=np.int64) for e in tokenizer.encode_batch(texts)])
