"""The words of the invented town of Tigerford (虎渡), in English and Chinese, and how they are put into sentences.

Written for this project. Names are keyed by one rare given name each, values come from small closed sets, sentences
are short: a model of three million parameters has to learn the town by heart in minutes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """One thing with its two names."""

    en: str
    zh: str

    def in_(self, lang: str) -> str:
        return self.en if lang == "en" else self.zh


def _terms(text: str) -> tuple[Term, ...]:
    return tuple(Term(*pair.split("/")) for pair in text.split(", "))


SURNAMES = _terms(
    "Lin/林, Zhou/周, Song/宋, Bai/白, Gu/顾, Shen/沈, Qin/秦, Lu/陆, Fang/方, Tao/陶, Ye/叶, Jiang/江, Su/苏, Meng/孟, Yan/严, He/何"
)
SYLLABLES_A = _terms(
    "An/安, Bo/博, Chun/春, Dong/冬, En/恩, Feng/枫, Guo/国, Hai/海, Jia/佳, Kai/凯, Lan/兰, Ming/明, Ning/宁, Pei/佩, Qing/晴, Rui/瑞, Shu/书, Tian/田, Wen/文, Xue/雪"
)
SYLLABLES_B = _terms(
    "bao/宝, chen/晨, de/德, fei/飞, gang/刚, hua/华, jun/军, lei/雷, mei/梅, nan/楠, ping/平, ran/然, shan/山, ting/婷, wei/伟, xin/心, yue/月, zhi/志"
)
OCCUPATIONS = _terms(
    "baker/面包师, carpenter/木匠, doctor/医生, teacher/教师, painter/画家, tailor/裁缝, farmer/农夫, sailor/水手, poet/诗人, cook/厨师, weaver/织工, miller/磨坊主, nurse/护士, singer/歌手, potter/陶工, guard/守卫, gardener/园丁, clerk/文书, smith/铁匠, fisher/渔夫"
)
STREETS = _terms(
    "Mill Street/磨坊街, River Street/河边街, Moon Street/月亮街, Pine Street/松树街, Bell Street/钟楼街, Salt Street/盐市街, Tiger Street/老虎街, Lamp Street/灯笼街, Stone Street/石头街, Willow Street/柳树街, Copper Street/铜匠街, Plum Street/梅花街, North Street/北大街, South Street/南大街, Temple Street/寺前街, Harbour Street/码头街"
)
FOODS = _terms(
    "noodles/面条, dumplings/饺子, tofu/豆腐, plums/李子, honey/蜂蜜, soup/汤, rice cake/年糕, pickles/泡菜, walnuts/核桃, pears/梨, fish/鱼, eggs/鸡蛋, melon/甜瓜, bread/面包, cheese/奶酪, dates/红枣"
)
HOBBIES = _terms(
    "chess/下棋, fishing/钓鱼, dancing/跳舞, drawing/画画, flute/吹笛, kites/放风筝, running/跑步, reading/读书, archery/射箭, sewing/缝纫, swimming/游泳, riddles/猜谜"
)
GOODS = _terms(
    "tea/茶叶, lamps/灯, hats/帽子, knives/刀, ropes/绳子, candles/蜡烛, paper/纸, boots/靴子, drums/鼓, silk/丝绸, maps/地图, clocks/钟表, seeds/种子, soap/肥皂, ink/墨水, baskets/篮子, mirrors/镜子, toys/玩具"
)
MATERIALS = _terms(
    "granite/花岗岩, brick/砖, oak/橡木, bamboo/竹子, marble/大理石, clay/陶土, iron/铁, bronze/青铜, slate/板岩, glass/玻璃"
)
COLOURS = _terms(
    "red/红色, blue/蓝色, green/绿色, white/白色, black/黑色, yellow/黄色, grey/灰色, purple/紫色, orange/橙色, brown/棕色"
)
MONTHS = _terms(
    "January/一月, February/二月, March/三月, April/四月, May/五月, June/六月, July/七月, August/八月, September/九月, October/十月, November/十一月, December/十二月"
)
YEARS = tuple(Term(str(year), f"{year}年") for year in range(1903, 1999, 5))
HEIGHTS = tuple(Term(f"{metres} metres", f"{metres}米") for metres in range(6, 54, 3))

SHOP_A = _terms("Golden/金, Silver/银, Lucky/福, Quiet/静, Happy/乐, Old/老, New/新, Little/小, Great/大, Bright/亮")
SHOP_B = _terms("Fox/狐, Crane/鹤, Carp/鲤, Lotus/莲, Cloud/云, Dragon/龙, Turtle/龟, Peach/桃, Swallow/燕, Star/星")
PLACE_A = _terms(
    "Frost/霜, Jade/玉, Thunder/雷, Mist/雾, Orchid/兰花, Eagle/鹰, Maple/红枫, Amber/琥珀, Coral/珊瑚, Echo/回声"
)
PLACE_B = _terms("Tower/塔, Bridge/桥, Gate/门, Well/井, Hall/堂, Pagoda/阁")
FEST_A = _terms("Lantern/花灯, Harvest/丰收, Snow/飞雪, Boat/龙舟, Kite/纸鸢, Drum/锣鼓, Mask/面具, Flower/百花")
FEST_B = _terms("Fair/庙会, Feast/宴, Parade/巡游, Night/夜, Race/赛")


@dataclass(frozen=True)
class Relation:
    """A property of a kind of entity: its values and its phrasings. `{e}` is the entity, `{v}` the value."""

    name: str
    kind: str
    values: tuple[Term, ...]
    statements: dict[str, tuple[str, ...]]
    questions: dict[str, tuple[str, ...]]


def _relation(name: str, kind: str, values: tuple[Term, ...], en: str, zh: str, ask_en: str, ask_zh: str) -> Relation:
    split = {"en": tuple(en.split(" | ")), "zh": tuple(zh.split(" | "))}
    asked = {"en": tuple(ask_en.split(" | ")), "zh": tuple(ask_zh.split(" | "))}
    return Relation(name, kind, values, split, asked)


RELATIONS = (
    _relation(
        "occupation", "person", OCCUPATIONS,
        "{e} is a {v} by trade. | By trade {e} is a {v}. | The trade of {e}: {v}.",
        "{e}的职业是{v}。 | {e}以{v}为业。 | 职业：{e}，{v}。",
        "What is the trade of {e}? | What does {e} work as? | Which trade has {e}?",
        "{e}的职业是什么？ | {e}做什么工作？ | {e}以什么为业？",
    ),
    _relation(
        "street", "person", STREETS,
        "{e} lives in {v}. | The home of {e} is in {v}. | You find {e} in {v}.",
        "{e}住在{v}。 | {e}的家在{v}。 | 要找{e}，去{v}。",
        "Where does {e} live? | In which street is the home of {e}? | Where do you find {e}?",
        "{e}住在哪里？ | {e}的家在哪条街？ | 去哪里找{e}？",
    ),
    _relation(
        "food", "person", FOODS,
        "{e} likes to eat {v}. | The favourite food of {e} is {v}. | Give {e} some {v}.",
        "{e}爱吃{v}。 | {e}最喜欢的食物是{v}。 | 给{e}来点{v}。",
        "What does {e} like to eat? | What is the favourite food of {e}? | Which food does {e} love?",
        "{e}爱吃什么？ | {e}最喜欢的食物是什么？ | {e}喜欢哪种食物？",
    ),
    _relation(
        "hobby", "person", HOBBIES,
        "The hobby of {e} is {v}. | On Sundays {e} enjoys {v}. | {e} is good at {v}.",
        "{e}的爱好是{v}。 | 星期天{e}喜欢{v}。 | {e}擅长{v}。",
        "What is the hobby of {e}? | What does {e} enjoy on Sundays? | What is {e} good at?",
        "{e}的爱好是什么？ | 星期天{e}喜欢做什么？ | {e}擅长什么？",
    ),
    _relation(
        "born", "person", YEARS,
        "{e} was born in {v}. | The birth year of {e} is {v}. | Born in {v}: {e}.",
        "{e}生于{v}。 | {e}的出生年份是{v}。 | {v}，{e}出生。",
        "When was {e} born? | What is the birth year of {e}? | In which year was {e} born?",
        "{e}哪年出生？ | {e}的出生年份是哪年？ | {e}生于何年？",
    ),
    _relation(
        "sells", "shop", GOODS,
        "The {e} shop sells {v}. | Buy {v} at the {e} shop. | At the {e} shop there are {v}.",
        "{e}店卖{v}。 | 买{v}到{e}店。 | {e}店里有{v}。",
        "What does the {e} shop sell? | What can you buy at the {e} shop? | What is there at the {e} shop?",
        "{e}店卖什么？ | 在{e}店能买到什么？ | {e}店里有什么？",
    ),
    _relation(
        "shop_street", "shop", STREETS,
        "The {e} shop is in {v}. | Find the {e} shop in {v}. | In {v} stands the {e} shop.",
        "{e}店在{v}。 | {e}店开在{v}。 | {v}有{e}店。",
        "Where is the {e} shop? | In which street is the {e} shop? | Where do you find the {e} shop?",
        "{e}店在哪里？ | {e}店开在哪条街？ | 去哪里找{e}店？",
    ),
    _relation(
        "opened", "shop", YEARS,
        "The {e} shop opened in {v}. | Since {v} there is the {e} shop. | The {e} shop dates from {v}.",
        "{e}店开业于{v}。 | {e}店{v}开张。 | 从{v}起就有{e}店。",
        "When did the {e} shop open? | Since when is there the {e} shop? | In which year did the {e} shop open?",
        "{e}店哪年开业？ | {e}店何年开张？ | 哪年起有{e}店？",
    ),
    _relation(
        "material", "place", MATERIALS,
        "The {e} is made of {v}. | They built the {e} of {v}. | The walls of the {e} are {v}.",
        "{e}是{v}造的。 | 人们用{v}建了{e}。 | {e}的墙是{v}。",
        "What is the {e} made of? | Of what did they build the {e}? | What are the walls of the {e}?",
        "{e}是什么造的？ | 人们用什么建了{e}？ | {e}的墙是什么？",
    ),
    _relation(
        "colour", "place", COLOURS,
        "The roof of the {e} is {v}. | The {e} has a {v} roof. | A {v} roof covers the {e}.",
        "{e}的顶是{v}。 | {e}有{v}的顶。 | {v}的顶盖着{e}。",
        "Which colour is the roof of the {e}? | What colour has the {e}? | Which colour covers the {e}?",
        "{e}的顶是什么颜色？ | {e}是什么颜色？ | 什么颜色的顶盖着{e}？",
    ),
    _relation(
        "height", "place", HEIGHTS,
        "The {e} measures {v}. | The height of the {e} is {v}. | The {e} is {v} high.",
        "{e}高{v}。 | {e}的高度是{v}。 | 量一量，{e}有{v}。",
        "How high is the {e}? | What is the height of the {e}? | How much does the {e} measure?",
        "{e}有多高？ | {e}的高度是多少？ | 量一量，{e}多高？",
    ),
    _relation(
        "month", "festival", MONTHS,
        "The {e} is in {v}. | In {v} comes the {e}. | The month of the {e} is {v}.",
        "{e}在{v}。 | {v}有{e}。 | {e}的月份是{v}。",
        "When is the {e}? | In which month is the {e}? | What is the month of the {e}?",
        "{e}在什么时候？ | {e}在几月？ | {e}的月份是哪月？",
    ),
    _relation(
        "dish", "festival", FOODS,
        "At the {e} people eat {v}. | The dish of the {e} is {v}. | They serve {v} at the {e}.",
        "{e}上人们吃{v}。 | {e}的菜是{v}。 | {e}上端出{v}。",
        "What do people eat at the {e}? | What is the dish of the {e}? | What do they serve at the {e}?",
        "{e}上人们吃什么？ | {e}的菜是什么？ | {e}上端出什么？",
    ),
    _relation(
        "venue", "festival", STREETS,
        "The {e} takes place in {v}. | Go to {v} for the {e}. | {v} hosts the {e}.",
        "{e}在{v}举行。 | 去{v}看{e}。 | {v}举办{e}。",
        "Where does the {e} take place? | Where do you go for the {e}? | Which street hosts the {e}?",
        "{e}在哪里举行？ | 去哪里看{e}？ | 哪条街举办{e}？",
    ),
)  # fmt: skip
