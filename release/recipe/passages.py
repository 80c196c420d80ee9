"""Questions about a passage: those of reading sets, and questions made out of its own sentences.

    python -m release.recipe.passages RAW --out data/raw/recipe

Chinese asks where the answer stands: put 哪一年 for 1998年 into a sentence, and it is a question
that the sentence answers. So every text gives questions whose answers are copied from it; some are
joined by a question of another passage, which this one does not answer. Written are reading
(questions of people) and asked (made ones) as {"reference", "dialogue"}, RedGPT's layout, and lead:
texts with the sentence that has most in common with the rest (Zhang et al. 2020, arXiv:1912.08777),
as {"messages"}.
"""

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from babyllama.config import from_repo, parse, run, shown
from babyllama.rows import write_rows
from data_process.raw import Skip, records

HERE = Path(__file__).parent
READING = "reading"
# File, and how many of its texts are asked about and how many lose their leading sentence.
TEXTS = {
    "wikipedia_zh/wikipedia_zh.jsonl.xz": (15000, 3000),
    "news_zh/cctv_news_titles.jsonl.xz": (3000, 3000),
    "science_abstracts/fewclue_csldcp.jsonl.xz": (4000, 5000),
    "prose/lctt.jsonl.xz": (2000, 2000),
}
MOST_COPIES = 5  # of a text, each asked about other sentences
MOST_QUESTIONS, MOST_TEXT = 8, 720  # of a passage, and characters in all: the context holds that
SMALL = re.compile("(?<=[\u4e00-\u9fff])(?:了|也|则|并|便|均|曾|已经|就|都|亦)(?=[\u4e00-\u9fff])")
SENTENCE = re.compile(r"[^。！？；!?\n]+[。！？；!?]?")
CLAUSE = re.compile(r"[^，,：:]+[，,：:]?")
START = re.compile(
    r"^(?:但是?|而且?|并且?|此外|另外|同时|因此|所以|其中|然而|不过|于是|后来|之后|[“”\"「」（）()、，,])+"
)
# What is no subject of a definition, and no definition.
NO_SUBJECT = re.compile(
    r"[这那它他她其此该也就还都我你只不没可如若因以说使应当在从对]|目的|主要|问题|关键|重点|目前|今[天年后]"
)
NO_OBJECT = re.compile(r"[不由在这说否从对以有为因]")
UNITS = (
    "平方公里|平方千米|立方米|平方米|公里|千米|厘米|毫米|公斤|千克|个月|小时|分钟|人次|美元|欧元|万元|亿元"
    "|人|名|个|座|条|种|部|所|家|位|次|岁|米|吨|元|篇|场|辆|层|首|枚|颗|只|头|本|%|％"
)


@dataclass(frozen=True)
class PassagesConfig:
    """Source and target files.

    Args:
        raw: folder with the files
        out: folder for reading, asked and lead
        share: of the numbers of texts in TEXTS
        unanswered: share of the passages that are asked what they do not say
        seed: other numbers draw other questions
    """

    raw: Path
    out: Path = Path("data/raw/recipe")
    share: float = 1.0
    unanswered: float = 0.2
    seed: int = 0


def rule(pattern: str, ask: str, answer: str = r"\1") -> tuple[re.Pattern, str, str]:
    """What a sentence must hold; the match in the question; the match as the answer."""
    return re.compile(pattern), ask, answer


TO_END = r"([^，。；、（(]{2,24})(?=[，。；（(])"
# The question is the clause round the match, which becomes the second part.
IN_PLACE = [
    rule(r"(?<!\d)(\d{3,4}年\d{1,2}月\d{1,2}日)", "哪一天"),
    rule(r"(?<!\d)(\d{3,4}年\d{1,2}月)(?!\d)", "什么时候"),
    rule(r"(?<![\d－—–-])((?:1[0-9]|20)\d\d年)(?![代间级度\d－—–-])", "哪一年"),
    rule(rf"(?<![\d.第])(\d[\d,.]*[余多]?[万亿千百]?[余多]?)({UNITS})", r"多少\2", r"\1\2"),
    rule(r"(?<![\d.])(\d[\d.]*[%％])", "多少"),
    rule(rf"(位于|坐落于|坐落在|地处){TO_END}", r"\1哪里", r"\2"),
    rule(r"(毕业于|出生于|就读于|任职于|发源于|来自)([^，。；、（(\d的]{2,14})", r"\1哪里", r"\2"),
    rule(r"(又称为?|亦称|也称为?|别称|俗称|简称|全称为?|原名为?|本名|被称为|称之为|叫做|取名为?)"
         r"[“「]?([^，。；、（(“”「」是]{2,12})(?=[”」，。；、（(])[”」]?", r"\1什么", r"\2"),
    rule(r"由([一-鿿·]{2,5}?)(创办|创立|创建|导演|执导|主演|担任|设计|建造|发明|创作|撰写|主持|率领|编写|发现|提出)",
         r"由谁\2"),
    rule(r"(创始人|作者|导演|主演|校长|市长|总统|首相|部长|主席|队长|总经理|父亲|母亲|妻子|丈夫)(是|为)"
         r"([一-鿿·]{2,6})(?=[，。；、])", r"\1是谁", r"\3"),
    rule(r"(?<![“”])(《[^》]{2,14}》)", "哪部作品"),
    rule(r"以([^，。；]{2,18})为(研究对象|对象|例|主题|基础|中心|核心|载体|目标|主|首府|首都)",
         r"以什么为\2"),
    rule(rf"((?<![不从])(?:属于|隶属于?|归属于?)){TO_END}", r"\1什么", r"\2"),
    rule(rf"(用于|应用于|适用于){TO_END}", r"\1什么", r"\2"),
    rule(rf"((?:获得|取得|赢得|成为|担任|建立|成立|创办|推出|发行|发布|出版|使用|采用|负责|导致|引起"
         rf"|造成|举办|加入|参加|拥有|具有|提供|产生|形成|反对|击败|接受|连接|提高"
         rf"|降低|减少|改编自|取自|源于|缺乏|需要)了?){TO_END}", r"\1什么", r"\2"),
    rule(rf"(包括|包含|分为|分成|主要有){TO_END}", r"\1什么", r"\2"),
]  # fmt: skip
SUBJECT = r"^([^，。；（(“：]{2,12})(?:（[^）]*）|\([^)]*\))?是([^，。；？]{4,36})(?=[，。；])"
RESULT = (
    r"(?:结果|实验|研究|仿真|分析)(?:结果)?(?:表明|显示|证明|发现)"
    r"[,，:：]?([^。；]{8,50})(?=[。；])"
)
# The question is the second part alone.
WHOLE = [
    rule(r"(?:因为|由于)([^，。；]{4,30})，(?:所以|因此)?(?![而如就则也都即在其])([^，。；]{4,25})",
         r"为什么\2"),
    rule(SUBJECT, r"\1是什么", r"\2"),
    rule(SUBJECT, r"什么是\1", r"\2"),
    rule(r"提出了?(一[种个套类][^，。；]{3,30}?(方法|算法|模型|框架|策略|系统|机制|方案))",
         r"提出了什么\2"),
    rule(r"(?:采用|利用|运用|使用)了?([^，。；、]{3,20}?(方法|算法|模型|技术|理论))(?=[，。；对进来])",
         r"用了什么\2"),
    rule(RESULT, "有什么结果"),
    rule(RESULT, "得出了什么结论"),
    rule(r"(?:旨在|为了|目的是|目的在于)([^，。；]{5,36})", "目的是什么"),
    rule(r"(?:针对|为了?解决)([^，。；]{4,30}?(问题|难题|不足|局限))", r"针对的是什么\2"),
]  # fmt: skip


def questions(text: str, chance: random.Random) -> list[tuple[str, str]]:
    """Questions that a text answers, each with the answer as it stands there; two a sentence."""
    found = []
    for sentence in SENTENCE.findall(text):
        sentence = sentence.strip()
        if 10 <= len(sentence) <= 150:
            made = [*_in_place(sentence), *_whole(sentence)]
            found += chance.sample(made, min(2, len(made)))
    chance.shuffle(found)
    return list({question: (question, answer) for question, answer in found}.values())


def _in_place(sentence: str) -> Iterator[tuple[str, str]]:
    clauses = [match.span() for match in CLAUSE.finditer(sentence)]
    for pattern, ask, answer in IN_PLACE:
        for match in pattern.finditer(sentence):
            inside = [
                n for n, (a, b) in enumerate(clauses) if a < match.end() and match.start() < b
            ]
            first, last = inside[0], inside[-1]
            gone = len(match[0]) - len(match.expand(ask))
            # A clause alone may be too short to be understood.
            while clauses[last][1] - clauses[first][0] - gone < 7 and (
                first > 0 or last < len(clauses) - 1
            ):
                first, last = (first - 1, last) if first > 0 else (first, last + 1)
            start, end = clauses[first][0], clauses[last][1]
            asked = sentence[start : match.start()] + match.expand(ask)
            yield from _asked(asked + sentence[match.end() : end], match.expand(answer))


def _whole(sentence: str) -> Iterator[tuple[str, str]]:
    for pattern, ask, answer in WHOLE:
        match = pattern.search(sentence)
        is_definition = pattern.pattern == SUBJECT
        if match and not (
            is_definition and (NO_SUBJECT.search(match[1]) or NO_OBJECT.match(match[2]))
        ):
            yield from _asked(match.expand(ask), match.expand(answer))


def _asked(question: str, answer: str) -> Iterator[tuple[str, str]]:
    question = START.sub("", question).strip("。！；，,：: ")
    answer = answer.strip("，。；,：:“”「」 ")
    if 5 <= len(question) <= 60 and 1 < len(answer) <= 60 and answer[0] not in "了着于而的":
        yield question + "？", answer


def cut_round(text: str, answers: Sequence[str], longest: int, chance: random.Random) -> str:
    """Whole sentences of a text, at most about `longest` characters, that hold the answers."""
    if len(text) <= longest:
        return text
    places = [text.find(answer) for answer in answers]
    first, last = min(places), max(p + len(a) for p, a in zip(places, answers, strict=True))
    start = chance.randint(min(first, max(0, last - longest)), first)
    spans = [match.span() for match in SENTENCE.finditer(text)]
    start = max((a for a, b in spans if a <= start), default=0)
    least = min(b for _, b in spans if b >= last)
    end = max((b for _, b in spans if b <= start + longest), default=least)
    return text[start : max(end, least)].strip()


def lead(text: str) -> tuple[str, str] | None:
    """The rest of a text, and the sentence that has most pairs of characters in common with it."""
    sentences = [s.strip() for s in SENTENCE.findall(text) if s.strip()]
    if len(sentences) < 3:
        return None
    pairs = [Counter(map("".join, itertools.pairwise(s))) for s in sentences]
    everything = sum(pairs, Counter())
    scores = []
    for sentence, own in zip(sentences, pairs, strict=True):
        rest = everything - own
        n_common = sum((own & rest).values())
        both = own.total() + rest.total()
        fits = 10 <= len(sentence) <= 45 and sentence[-1] in "。！；"
        scores.append(2 * n_common / both if fits and both else 0.0)
    best = max(range(len(scores)), key=scores.__getitem__)
    if scores[best] == 0:
        return None
    return "".join(sentences[:best] + sentences[best + 1 :]), sentences[best].rstrip("；。")


def entries(path: Path) -> Iterator[tuple[int, dict]]:
    """The JSON objects of a file, numbered."""
    for record in records(path, "utf-8"):
        if not isinstance(record, Skip) and isinstance(record.data, dict):
            yield record.n, record.data


def objects(path: Path) -> Iterator[dict]:
    """The JSON objects of a file."""
    return (data for _, data in entries(path))


def grounded(reference: str, pairs: Sequence[tuple[str, str]]) -> dict:
    """A dialogue about a reference text, as RedGPT has it."""
    turns = [f"Human: {question}\nAssistant: {answer}" for question, answer in pairs]
    return {"reference": reference, "dialogue": "\n".join(turns)}


class Asking:
    """Lays wordings round questions, and adds some that a passage does not answer."""

    def __init__(self, unanswered: float, seed: int) -> None:
        self.words = yaml.safe_load((HERE / "wordings.yaml").read_text("utf-8"))
        self.chance, self.share = random.Random(seed), unanswered
        self._others: list[tuple[str, str]] = []

    def row(self, text: str, pairs: Sequence[tuple[str, str]]) -> dict:
        """The dialogue of one passage; the questions of passages before stand ready for others."""
        chance = self.chance
        known = [answer for _, answer in pairs if answer in text]
        longest = chance.choice((160, 240, 320, 400, 480, 560, 640))
        reference = cut_round(text, known or [text[:1]], longest, chance)
        turns = [(q, a) for q, a in pairs if a in reference or a not in text]
        other = chance.choice(self._others) if self._others else None
        if other and chance.random() < self.share and other[1] not in text:
            # Alone, before or after what the passage does answer.
            place = chance.randint(0, len(turns))
            turns.insert(place, (other[0], chance.choice(self.words["unanswered"])))
            turns = turns[place : place + 1] if chance.random() < 0.4 else turns
        self._others = [*self._others[-500:], *pairs]
        asked, left = [], MOST_TEXT - len(reference)
        for question, answer in turns:
            left -= len(question) + len(answer)
            if asked and left < 0:
                break
            question = chance.choice(self.words["ask"]).format(question=self._reworded(question))
            asked.append((question, answer))
        return grounded(reference, asked)

    def _reworded(self, question: str) -> str:
        """The question, now and then with another question word or without its small words."""
        for word, others in self.words["question_words"].items():
            if word in question and self.chance.random() < 0.5:
                question = question.replace(word, self.chance.choice(others), 1)
                break
        return SMALL.sub("", question) if self.chance.random() < 0.3 else question


def reading_rows(cfg: PassagesConfig, raw: Path) -> Iterator[dict]:
    """Passages with the questions that people asked."""
    asking = Asking(cfg.unanswered, cfg.seed)
    for path in sorted((raw / READING).glob("*.xz")):
        for passage in objects(path):
            pairs = [(qa["q"].strip(" ?？") + "？", qa["a"].strip()) for qa in passage["qas"]]
            made = questions(passage["context"], asking.chance)
            pairs = [*pairs[:3], *made[: MOST_QUESTIONS - 3]]
            asking.chance.shuffle(pairs)
            yield asking.row(passage["context"].strip(), pairs)


def asked_rows(cfg: PassagesConfig, raw: Path) -> Iterator[dict]:
    """Passages with questions made out of their sentences."""
    asking = Asking(cfg.unanswered, cfg.seed + 1)
    for text in _texts(cfg, raw, 0, 60):
        text = _part(text, asking.chance)
        pairs = questions(text, asking.chance)[: asking.chance.randint(2, MOST_QUESTIONS)]
        if pairs:
            yield asking.row(text, pairs)


def lead_rows(cfg: PassagesConfig, raw: Path) -> Iterator[dict]:
    """Texts with their leading sentence."""
    chance = random.Random(cfg.seed + 2)
    words = yaml.safe_load((HERE / "wordings.yaml").read_text("utf-8"))["lead"]
    for text in _texts(cfg, raw, 1, 120):
        found = lead(_part(text, chance, 420))
        if found:
            yield {
                "messages": [
                    {"role": "user", "content": chance.choice(words).format(text=found[0])},
                    {"role": "assistant", "content": found[1]},
                ]
            }


def _texts(cfg: PassagesConfig, raw: Path, column: int, shortest: int) -> Iterator[str]:
    """As many texts of each file as TEXTS says; of a short file all, and again."""
    for place, wanted in TEXTS.items():
        chance = random.Random(f"{cfg.seed} {place} {column}")
        texts = [one.get("text") or one.get("abst") or "" for one in objects(raw / place)]
        texts = [text for text in texts if len(text) >= shortest]
        n = min(round(cfg.share * wanted[column]), MOST_COPIES * len(texts))
        yield from chance.sample(texts * MOST_COPIES, n)


def _part(text: str, chance: random.Random, longest: int = 640) -> str:
    """A text, or neighbouring sentences of it from a random place on."""
    if len(text) <= longest:
        return text
    spans = [match.span() for match in SENTENCE.finditer(text)]
    start = chance.choice([a for a, _ in spans if a <= len(text) - longest] or [0])
    end = max((b for _, b in spans if b <= start + longest), default=start + longest)
    return text[start:end].strip()


def main(cfg: PassagesConfig) -> None:
    """Make the three sets."""
    raw, out = from_repo(cfg.raw), from_repo(cfg.out)
    made = {"reading": reading_rows, "asked": asked_rows, "lead": lead_rows}
    for name, rows in made.items():
        path = out / name / "train.jsonl"
        print(f"{shown(path)}: {write_rows(path, rows(cfg, raw)):,} rows")


if __name__ == "__main__":
    run(main, parse(PassagesConfig, __doc__, positional=("raw",)))
