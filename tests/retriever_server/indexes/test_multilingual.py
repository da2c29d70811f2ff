"""Retrieval in Chinese and German with the analyzer multilingual, on small sets of our own."""

import pytest

from data.corpus import Corpus
from data.jsonl import write_jsonl
from retriever_server.indexes.bm25 import BM25Index

CHINESE = """长城是中国古代的防御工程，东起山海关，西至嘉峪关。
熊猫主要以竹子为食，生活在四川的高山森林里。
造纸术由蔡伦在东汉时期改进，使书写材料更便宜。
长江是亚洲最长的河流，注入东海。
光合作用把二氧化碳和水转化为葡萄糖和氧气。
李白是唐代著名诗人，写了许多关于月亮的诗。
火车站位于城市的南部，每天有上百列高铁经过。
糖尿病患者需要控制血糖，并定期检查眼睛。
月球围绕地球公转一周大约需要二十七天。
豆腐是用大豆制成的食品，含有丰富的蛋白质。
围棋起源于中国，棋盘上有三百六十一个交叉点。
地震发生时应当躲在坚固的桌子下面。
丝绸之路连接了长安与地中海沿岸的城市。
乒乓球比赛每局先得十一分者获胜。
青蒿素由屠呦呦发现，用于治疗疟疾。
图书馆周末开放到晚上九点，可以借阅五本书。
台风在西太平洋形成，夏季常常登陆福建。
故宫是明清两代的皇宫，位于北京的中心。
蜜蜂通过舞蹈告诉同伴花蜜的方向。
电动汽车的电池在低温下续航里程会下降。"""
CHINESE_QUERIES = {
    "熊猫吃什么": 1,
    "谁改进了造纸术": 2,
    "亚洲最长的河流是哪一条": 3,
    "植物如何产生氧气": 4,
    "唐代诗人写月亮": 5,
    "月球公转需要几天": 8,
    "疟疾的治疗药物是谁发现的": 14,
    "明清的皇宫在哪里": 17,
    "蜜蜂的舞蹈": 18,
    "低温对电动汽车电池的影响": 19,
}
GERMAN = """Die Häuser der Altstadt wurden nach dem Krieg wieder aufgebaut.
Der Bäcker verkauft jeden Morgen frische Brötchen und dunkles Brot.
Bienen bestäuben die Blüten der Obstbäume im Frühling.
Die Straße nach Norden ist wegen Bauarbeiten gesperrt.
Der Arzt verschrieb dem Kranken ein Mittel gegen Fieber.
Im Winter frieren die kleinen Seen in den Bergen zu.
Die Kinder spielten im Garten mit einem roten Ball.
Züge nach München fahren stündlich vom Hauptbahnhof ab.
Der Dichter schrieb Gedichte über die Wälder seiner Heimat.
Das Museum zeigt Gemälde niederländischer Maler.
Die Brücke über den Fluss wurde vor hundert Jahren gebaut.
Katzen schlafen bis zu sechzehn Stunden am Tag.
Das Gericht verurteilte den Dieb zu zwei Jahren Gefängnis.
Der Vulkan brach aus und bedeckte die Insel mit Asche.
Wölfe jagen in Rudeln und verständigen sich durch Heulen.
Die Sängerin trat in vielen Opernhäusern auf.
Der Bauer erntet im Herbst Kartoffeln und Rüben.
Ein Schlüssel öffnet das alte Schloss der Kirche nicht mehr.
Die Wahl des Bürgermeisters findet im Mai statt.
Sterne entstehen in großen Wolken aus Gas und Staub."""
GERMAN_QUERIES = {
    "Wann baute man das Haus in der Altstadt auf?": 0,
    "frisches Brot vom Baecker, Brötchen": 1,
    "Biene und Blüte": 2,
    "gesperrte Strasse": 3,
    "kranke Menschen mit Fieber": 4,
    "gefrorener kleiner See am Berg": 5,
    "Zug nach MÜNCHEN": 7,
    "Gedicht über den Wald": 8,
    "Gemälde eines Malers": 9,
    "großer Stern aus Gas": 19,
}


def found_share(folder, passages: list[str], queries: dict[str, int], k: int, **settings) -> float:
    """The share of queries whose passage is among the best k."""
    write_jsonl(folder / "corpus.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(passages)])
    index = BM25Index.build(Corpus(folder / "corpus.jsonl"), folder / "index", **settings)
    rankings = index.search(list(queries), k)
    pairs = zip(rankings, queries.values(), strict=True)
    return sum(str(gold) in [hit.passage.id for hit in hits] for hits, gold in pairs) / len(queries)


@pytest.mark.parametrize(
    ("passages", "queries", "language"),
    [(CHINESE, CHINESE_QUERIES, "none"), (GERMAN, GERMAN_QUERIES, "german")],
    ids=["chinese", "german"],
)
def test_questions_find_their_passages_among_distractors(tmp_path, passages, queries, language):
    folders = [tmp_path / name for name in ("plain", "multilingual")]
    for folder in folders:
        folder.mkdir()
    texts = passages.splitlines()
    settings = {"analyzer": "multilingual", "language": language}
    assert found_share(folders[1], texts, queries, 3, **settings) >= 0.9  # stricter than recall@10
    assert found_share(folders[0], texts, queries, 3, analyzer="plain") < 0.9


OTHERS = {
    "japanese": (
        "none",
        "富士山は日本で一番高い山です。|京都には多くの寺があります。|寿司は酢飯と魚で作られます。|"
        "新幹線は東京と大阪を結びます。|桜は春に咲きます。",
        "日本一高い山|京都の寺|魚の寿司|東京から大阪への新幹線|春に咲く桜",
    ),
    "korean": (
        "none",
        "한라산은 제주도에 있는 산이다.|김치는 배추로 만든 발효 음식이다.|서울은 대한민국의 수도이다.|"
        "세종대왕은 한글을 만들었다.|태권도는 한국의 무술이다.",
        "제주도의 산|배추 김치|한국의 수도 서울|한글을 누가 만들었나|무술 태권도",
    ),
    "arabic": (
        "arabic",
        "النيل أطول نهر في أفريقيا.|القاهرة عاصمة مصر.|كتب الطالب الرسائل إلى المدرسة.|"
        "القمر يدور حول الأرض.|البرتقال فاكهة غنية بالفيتامينات.",
        "نهر النيل|ما هي عاصمة مصر|رسائل الطالب|دوران القمر حول الارض|فاكهة البرتقال",
    ),
    "thai": (
        "none",
        "กรุงเทพเป็นเมืองหลวงของประเทศไทย|ช้างเป็นสัตว์ขนาดใหญ่|ข้าวผัดทำจากข้าวและไข่|"
        "แม่น้ำโขงไหลผ่านหลายประเทศ|มวยไทยเป็นกีฬาประจำชาติ",
        "เมืองหลวงของไทย|สัตว์ขนาดใหญ่|ข้าวผัดไข่|แม่น้ำโขง|กีฬามวยไทย",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_scripts_find_their_passages_first(tmp_path, name):
    language, passages, questions = OTHERS[name]
    queries = {question: i for i, question in enumerate(questions.split("|"))}
    settings = {"analyzer": "multilingual", "language": language}
    assert found_share(tmp_path, passages.split("|"), queries, 1, **settings) == 1
