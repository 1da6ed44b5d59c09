#!/usr/bin/env bash
# The embedded model "en-ner": persons, places and organisations in English text, at most 8 MB.
#
#   BASE=path/to/MiniLM en-ner.sh DATA_ROOT OUT
#
# DATA_ROOT holds <set>/<language>/{train,dev,test}.conll.gz (wnut17/en, uner/en, crossner/<domain>,
# wikigold/en, wikineural/en) and <set>/unlabeled.txt.gz. The labelled sets have licences
# that let the weights be published: uner/en CC BY-SA 4.0, wnut17 CC BY 4.0, crossner MIT. Teacher,
# student and scores come to lie in OUT. Started again, it goes on where it was.
#
# Variables: BASE, a Hugging Face encoder (folder or Hub id); TRANSFER, unlabelled files below
# DATA_ROOT; XDISTIL, the command.
set -eu
[ $# -eq 2 ] || { echo "usage: BASE=ENCODER $0 DATA_ROOT OUT" >&2; exit 2; }
data=$1
out=$2
base=${BASE:-sentence-transformers/all-MiniLM-L6-v2}
transfer=${TRANSFER:-wikineural/en/train.conll.gz bbc-news/unlabeled.txt.gz}
xdistil=${XDISTIL:-xdistil}
map=$(dirname "$0")/en-ner.labels.json
mkdir -p "$out"

run() {
  printf '+ %s\n' "$*" >&2
  "$@"
}

texts=
for file in $transfer; do texts="$texts $data/$file"; done

labelled="$data/uner/en/train.conll.gz $data/wnut17/en/train.conll.gz"
for split in train dev; do
  for domain in ai literature music politics science; do
    labelled="$labelled $data/crossner/$domain/$split.conll.gz"
  done
done
dev="$data/uner/en/dev.conll.gz $data/wnut17/en/dev.conll.gz"

# $xdistil may be several words; none of the lists holds a name with white space.
# shellcheck disable=SC2086
run $xdistil teacher --model "$base" --label-map "$map" --train $labelled --dev $dev \
  -o "$out/teacher"
# shellcheck disable=SC2086
run $xdistil distill --teacher "$out/teacher" --label-map "$map" --train $labelled --dev $dev \
  --transfer $texts --augment swap=1,dropout=1 --student 50x200 --embedding-dtype float16 \
  --cache "$out/cache" -o "$out/float32"
# shellcheck disable=SC2086
[ -d "$out/en-ner" ] || run $xdistil quantize "$out/float32" --label-map "$map" --dev $dev \
  -o "$out/en-ner"

size=$(cat "$out/en-ner"/* | wc -c)
echo "en-ner: $size bytes" >&2
[ "$size" -le 8000000 ] || { echo "en-ner is larger than 8 MB" >&2; exit 1; }

for set in uner/en wikigold/en wnut17/en; do
  for model in teacher en-ner; do
    # shellcheck disable=SC2086
    run $xdistil eval "$out/$model" --data "$data/$set/test.conll.gz" --label-map "$map" \
      --json "$out/$model.$(dirname "$set").json"
  done
done
