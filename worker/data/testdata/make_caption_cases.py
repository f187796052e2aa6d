"""Writes caption_cases.json, which the tests of caption.rs compare with: what each language's rules choose and leave of a caption.

The rules are written here a second time, as regular expressions over Unicode's own scripts where caption rules name a script.
usage: make_caption_cases.py FOLDER        (regex 2025 or newer, OpenCC 1.2.0)"""
import json
import sys

import opencc
import regex

simplify = opencc.OpenCC("t2s").convert

# Per language: keys of native captions, what makes one native (nothing: that it is there), and what cleaning deletes.
KANA_RANGES = r"\p{Script=Hiragana}\p{Script=Katakana}ー\uFF70\uFF9E\uFF9F\u3099-\u309C"
LANGUAGES = {
    "zh": ([["caption_ori", "caption_ori_zh"], ["caption_ori_en"]], r"[\u4E00-\u9FFF]", r"[^\u4E00-\u9FA50-9,.!?:;，。！？：；“”]"),
    "ja": (
        [["caption_ori", "caption_ori_ja"], ["caption_ori_en"]],
        f"[{KANA_RANGES}]",
        f"[^{KANA_RANGES}\\p{{Script=Han}}0-9,.!?:;、。，．！？：；「」『』・〜“”]",
    ),
    "ko": ([["caption_ori", "caption_ori_ko"], ["caption_ori_en"]], r"\p{Script=Hangul}", r"[^\p{Script=Hangul}0-9 ,.!?:;'\"“”‘’()~\-·]"),
    "ru": ([["caption_ori", "caption_ori_ru"], ["caption_ori_en"]], r"\p{Script=Cyrillic}", r"[^\p{Script=Cyrillic}\u0300-\u036F0-9 ,.!?:;'\"«»„“”()\-–—]"),
    "it": ([["caption_ori_it"]], None, r"[^\p{Script=Latin}\u0300-\u036F0-9 ,.!?:;'’\"«»“”()\-–—]"),
}
SPACED = {"ko", "ru", "it"}


def clean(language, text):
    if language in SPACED:
        text = regex.sub(r"\s", " ", text)
    text = regex.sub(LANGUAGES[language][2], "", text)
    if language in SPACED:
        text = regex.sub(" +", " ", text).strip(" ")
    return simplify(text) if language == "zh" else text


def choose(language, found):
    native_keys, native, _ = LANGUAGES[language]
    english = found.get("caption_en", "")
    for keys in native_keys:
        text = next((found[key] for key in keys if key in found), None)
        if text is None or not (regex.search(native, text) if native else text.strip()):
            continue
        prompt = clean(language, text)
        if not regex.search(native or r"\p{Script=Latin}", prompt):
            return {"dropped": "emptied"}
        return {"prompt": prompt, "english": english, "native": True}
    if f"caption_{language}" not in found and "caption_en" not in found:
        return {"dropped": "no_caption"}
    prompt = found.get(f"caption_{language}", "")
    if bool(prompt.strip()) != bool(english.strip()):
        return {"dropped": "one_sided"}
    return {"prompt": prompt, "english": english, "native": False}


TEXTS = {
    "zh": [
        "一隻紅色的貓，坐在 sofa 上！", "蘇州園林（拙政園）、2023年。", "頭髮發財、乾燥乾隆", "A red cat", "龦", "鿋 3", "ａｂｃ１２３山水", "〇一二", "水墨\n畫",
        "𠮷野家", "“春眠不覺曉”…",
    ],
    "ja": [
        "赤い猫がソファに座っている。", "桜の下で、お花見！ 2023年 (京都)", "ラーメン・ライス", "紅葉", "A red cat", "ｶﾀｶﾅの文字", "人々が「こんにちは」と言う", "日々〜",
        "ー", "東京　タワーの夜", "漢字とかな\tTシャツ", "㋐の丸", "か\u3099っこう", "ｶﾞｶﾞｰ", "⼈の道",
    ],
    "ko": [
        "소파에 앉은 빨간 고양이.", "서울의 밤  (야경) \n 2023년!", "K-pop 아이돌 콘서트", "ㅋㅋㅋ 웃는 강아지", "A red cat", "漢字", "한글 漢字 혼용", "‘김치’와 “불고기”·밥",
        "가~나", "\u1112\u1161\u11ab 자모", "㈜한국 ￦ ﾡ",
    ],
    "ru": [
        "Красный кот сидит на диване.", "Ёлка — символ Нового года, 2023!", "Кот по имени Tom\nиграет  в PlayStation 5", "«Война и мир»: обложка", "A red cat", "їжак і ґанок",
        "№ 5, Москва", "!!! 2023", "ѣ и ѳ", "кофе☕утром", "слово\u00a0слово", "мои\u0306 кот", "cafe\u0301",
    ],
    "it": [
        "Un gatto rosso seduto sul divano.", "L’università di Bologna, perché no? È lì!", "caffè ☕ a  Roma\n2023", "   ", "猫 gatto", "猫", "«Ciao» – disse l'uomo (piano)", "12 %!",
        "œuvre ﬁne ª º", "naïve Ångström ß", "caffe\u0300",
    ],
}

cases = []
for language, texts in TEXTS.items():
    own = f"caption_ori_{language}"
    founds = [{own: text, f"caption_{language}": texts[0], "caption_en": "x"} for text in texts]
    founds += [
        {"caption_ori": texts[0]},
        {"caption_ori": "plain English", own: texts[0], f"caption_{language}": texts[1], "caption_en": "y"},
        {"caption_ori": "plain English", "caption_ori_en": texts[0]},
        {f"caption_{language}": texts[1], "caption_en": "parallel  and uncleaned"},
        {f"caption_{language}": texts[1]},
        {"caption_en": "only English"},
        {},
    ]
    cases += [{"language": language, "found": found, "chosen": choose(language, found)} for found in founds]

with open(f"{sys.argv[1]}/caption_cases.json", "w") as out:
    out.write("[\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases) + "\n]\n")
