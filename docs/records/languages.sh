#!/bin/sh
# Cuts the parts of the data sets that the runs on many languages (ner35, pos40) learn from.
# Usage: docs/records/languages.sh DATA OUT
# Makes OUT/{ner,pos}/LANG.{train,unlabelled,dev,test}.conll and OUT/flores/LANG.txt; what a file
# has too little for is shorter, or missing. Sentences are taken in the order of the files. Where a set has
# no test file here, test is what follows the first 100 sentences of dev.
set -eu
data=$1 out=$2
mkdir -p "$out/ner" "$out/pos" "$out/flores"

sentences() { # FILE FROM TO: sentences FROM..TO of a CoNLL file, counted from 1
    gzip -dc "$1" | awk -v from="$2" -v to="$3" \
        'BEGIN { n = 1 } n >= from && n <= to { print } NF == 0 { n++ }'
}

cut() { # TASK LANG FOLDER TRAIN: the first TRAIN sentences keep their tags, the next 1,500 lose them
    to=$out/$1/$2
    if [ -f "$3/train.conll.gz" ]; then
        sentences "$3/train.conll.gz" 1 "$4" > "$to.train.conll"
        sentences "$3/train.conll.gz" $(($4 + 1)) $(($4 + 1500)) > "$to.unlabelled.conll"
        [ -s "$to.unlabelled.conll" ] || rm "$to.unlabelled.conll"
        sentences "$3/dev.conll.gz" 1 100 > "$to.dev.conll"
    fi
    if [ -f "$3/test.conll.gz" ]; then
        sentences "$3/test.conll.gz" 1 1000 > "$to.test.conll"
    else
        sentences "$3/dev.conll.gz" 101 1100 > "$to.test.conll"
        [ -s "$to.test.conll" ] || rm "$to.test.conll"
    fi
}

while read -r language set; do
    cut ner "$language" "$data/$set/$language" 800
done << SETS
af nchlt
ar news-transfer
bg bsnlp2021
bn bengali-ner
bs wikiann-trans-ner
cs bsnlp2021
da uner
de conll2003
el elner4
en conll2003
es conll2002
et estner
fa news-transfer
fi turku-ner
fr news-transfer
he nemo
hi hiner
hu nerkor
id nergrit
it news-transfer
lv news-transfer
mk wikiann-trans-ner
nl conll2002
no news-transfer
pl bsnlp2021
pt uner
ro news-transfer
ru bsnlp2021
sk uner
sl ssj500k
sq wikiann-trans-ner
sr uner
sv uner
tr turkish-wiki-ner
uk news-transfer
SETS

for folder in "$data"/ud-pos/*; do
    cut pos "$(basename "$folder")" "$folder" 600
done

for train in "$out"/pos/*.train.conll; do
    language=$(basename "$train" .train.conll)
    gzip -dc "$data/flores200/$language.txt.gz" > "$out/flores/$language.txt"
done

cat > "$out/ner/label-map.json" << MAP
{"PER": "PER", "per": "PER", "PERS": "PER", "PERSON": "PER",
 "ORG": "ORG", "org": "ORG", "ORGANIZATION": "ORG", "ORGANISATION": "ORG",
 "LOC": "LOC", "loc": "LOC", "LOCATION": "LOC", "PLACE": "LOC", "GPE": "LOC", "*": null}
MAP
