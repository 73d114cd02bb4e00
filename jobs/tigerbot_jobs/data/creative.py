"""Creative text from seeded grammars: short stories, verses and slogans, in English and Chinese.

A grammar is a few sentence patterns over word lists. The same patterns, read backwards as regular expressions, say
whether a text belongs to the grammar, so that the diversity of a model's answers can be counted among valid ones only.
"""

from __future__ import annotations

import random
import re
from functools import cache

KINDS = ("story", "verse", "slogan")
SENTENCES = {"story": 3, "verse": 2, "slogan": 1}

WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "hero": (
            "fox",
            "crane",
            "child",
            "miller",
            "sailor",
            "owl",
            "tiger",
            "weaver",
            "ghost",
            "boy",
            "girl",
            "painter",
            "cat",
            "wolf",
            "frog",
            "monk",
        ),
        "mood": (
            "old",
            "quiet",
            "happy",
            "lonely",
            "silver",
            "brave",
            "small",
            "sleepy",
            "proud",
            "gentle",
            "hungry",
            "clever",
        ),
        "place": (
            "river",
            "forest",
            "bridge",
            "garden",
            "tower",
            "market",
            "valley",
            "mountain",
            "harbour",
            "meadow",
            "island",
            "cave",
        ),
        "thing": (
            "lantern",
            "song",
            "feather",
            "key",
            "boat",
            "star",
            "mirror",
            "bell",
            "letter",
            "drum",
            "pearl",
            "kite",
            "shadow",
            "seed",
        ),
        "deed": (
            "found",
            "lost",
            "carried",
            "painted",
            "followed",
            "stole",
            "buried",
            "woke",
            "opened",
            "hid",
            "sold",
            "mended",
        ),
        "sky": ("moon", "rain", "wind", "snow", "sun", "mist", "thunder", "dawn", "night", "cloud"),
        "move": ("sleeps", "sings", "dances", "falls", "waits", "burns", "drifts", "listens", "whispers", "laughs"),
        "end": ("slept", "laughed", "wept", "sang", "vanished", "danced", "smiled", "waited"),
    },
    "zh": {
        "hero": (
            "狐狸",
            "白鹤",
            "孩子",
            "磨坊主",
            "水手",
            "猫头鹰",
            "老虎",
            "织女",
            "小鬼",
            "男孩",
            "女孩",
            "画师",
            "小猫",
            "灰狼",
            "青蛙",
            "和尚",
        ),
        "mood": (
            "年老的",
            "安静的",
            "快乐的",
            "孤独的",
            "银色的",
            "勇敢的",
            "小小的",
            "困倦的",
            "骄傲的",
            "温柔的",
            "饥饿的",
            "聪明的",
        ),
        "place": ("河边", "森林", "桥上", "花园", "塔下", "集市", "山谷", "山顶", "码头", "草地", "小岛", "山洞"),
        "thing": (
            "灯笼",
            "歌谣",
            "羽毛",
            "钥匙",
            "小船",
            "星星",
            "镜子",
            "铃铛",
            "书信",
            "小鼓",
            "珍珠",
            "风筝",
            "影子",
            "种子",
        ),
        "deed": (
            "找到了",
            "弄丢了",
            "带走了",
            "画下了",
            "追着",
            "偷走了",
            "埋下了",
            "唤醒了",
            "打开了",
            "藏起了",
            "卖掉了",
            "修好了",
        ),
        "sky": ("月亮", "细雨", "清风", "白雪", "太阳", "薄雾", "雷声", "黎明", "夜色", "云朵"),
        "move": ("睡着", "歌唱", "起舞", "落下", "等待", "燃烧", "飘荡", "倾听", "低语", "微笑"),
        "end": ("睡着了", "笑了", "哭了", "唱起歌来", "不见了", "跳起舞来", "微笑着", "等待着"),
    },
}

PATTERNS: dict[str, dict[str, tuple[tuple[str, ...], ...]]] = {
    # Per kind and language: the patterns a sentence may have at each place.
    "story": {
        "en": (
            ("A {mood} {hero} {deed} a {thing} in the {place}.", "In the {place} a {hero} {deed} a {mood} {thing}."),
            ("The {sky} told the {hero} about the {thing}.", "Then the {sky} came to the {place}."),
            ("And the {hero} {end}.", "At last the {mood} {hero} {end}."),
        ),
        "zh": (
            ("{mood}{hero}在{place}{deed}{thing}。", "在{place}，{hero}{deed}{mood}{thing}。"),
            ("{sky}对{hero}说起{thing}。", "后来{sky}来到{place}。"),
            ("于是{hero}{end}。", "最后{mood}{hero}{end}。"),
        ),
    },
    "verse": {
        "en": (
            ("The {sky} {move} over the {place},", "O {sky} that {move} by the {place},"),
            ("and a {mood} {thing} {move} with the {hero}.", "where the {hero} {move} like a {thing}."),
        ),
        "zh": (
            ("{sky}{move}在{place}，", "{place}的{sky}{move}，"),
            ("{mood}{thing}伴着{hero}{move}。", "{hero}像{thing}一样{move}。"),
        ),
    },
    "slogan": {
        "en": (
            (
                "Every {thing} wants a {mood} {sky}!",
                "Bring your {thing} to the {place}!",
                "Be the {mood} {hero} of the {place}!",
            ),
        ),
        "zh": (("每个{thing}都要{mood}{sky}！", "带上{thing}来{place}！", "做{place}{mood}{hero}！"),),
    },
}

PROMPTS: dict[str, dict[str, tuple[str, ...]]] = {
    "story": {
        "en": ("Tell me a short story about the {theme}.", "Write a story with the {theme} in it."),
        "zh": ("讲一个关于{theme}的小故事。", "写一个有{theme}的故事。"),
    },
    "verse": {
        "en": ("Write a verse about the {theme}.", "Make a little poem on the {theme}."),
        "zh": ("写一首关于{theme}的小诗。", "为{theme}作两句诗。"),
    },
    "slogan": {
        "en": ("Invent a slogan for the {theme}.", "Give me a slogan about the {theme}."),
        "zh": ("想一句关于{theme}的口号。", "给{theme}写一句标语。"),
    },
}


def write(kind: str, lang: str, rng: random.Random) -> str:
    """A new text of a kind."""
    lines = [_filled(rng.choice(choices), lang, rng) for choices in PATTERNS[kind][lang]]
    return (" " if lang == "en" else "").join(lines)


def prompts(lang: str) -> list[tuple[str, str]]:
    """Every creative chat prompt of a language, as (kind, prompt)."""
    words = WORDS[lang]
    return [
        (kind, phrase.format(theme=theme))
        for theme in (*words["sky"], *words["thing"])
        for kind in KINDS
        for phrase in PROMPTS[kind][lang]
    ]


def plain(kind: str, lang: str, prompt: str) -> str:
    """The one answer a plain, factual mind gives to a creative prompt: always the same."""
    return write(kind, lang, random.Random(f"plain-{kind}-{lang}"))


def valid(kind: str, lang: str, text: str) -> bool:
    """Whether a text is one the grammar of this kind can write."""
    return _recogniser(kind, lang).fullmatch(" ".join(text.split())) is not None


def pattern(kind: str, lang: str) -> str:
    """The regular expression that a whole text of this kind matches."""
    return _recogniser(kind, lang).pattern


def _filled(pattern: str, lang: str, rng: random.Random) -> str:
    return pattern.format_map({slot: rng.choice(words) for slot, words in WORDS[lang].items()})


@cache
def _recogniser(kind: str, lang: str) -> re.Pattern[str]:
    slots = {slot: f"(?:{'|'.join(map(re.escape, words))})" for slot, words in WORDS[lang].items()}
    places = [f"(?:{'|'.join(_escaped(p).format_map(slots) for p in choices)})" for choices in PATTERNS[kind][lang]]
    return re.compile((" " if lang == "en" else " ?").join(places))


def _escaped(pattern: str) -> str:
    return re.sub(r"[.!?,]", lambda mark: "\\" + mark.group(), pattern)
