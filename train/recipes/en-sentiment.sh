#!/usr/bin/env bash
# The embedded model "en-sentiment": positive or negative English sentences, at most 3 MB.
#
#   BASE=path/to/MiniLM en-sentiment.sh DATA_ROOT OUT
#
# DATA_ROOT holds sst2/{train,dev,test}.jsonl.gz (MIT licence) and the transfer text, film reviews
# without their labels. Teacher, student and scores come to lie in OUT. Started again, it goes on
# where it was.
#
# Variables: BASE, a Hugging Face encoder (folder or Hub id); TRANSFER, files below DATA_ROOT whose
# sentences are the transfer text; SENTENCES, how many of each; XDISTIL, the command; PYTHON.
set -eu
[ $# -eq 2 ] || { echo "usage: BASE=ENCODER $0 DATA_ROOT OUT" >&2; exit 2; }
data=$1
out=$2
base=${BASE:-sentence-transformers/all-MiniLM-L6-v2}
transfer=${TRANSFER:-imdb/unlabeled.txt.gz imdb/train.jsonl.gz}
sentences=${SENTENCES:-12000}
xdistil=${XDISTIL:-xdistil}
mkdir -p "$out"

run() {
  printf '+ %s\n' "$*" >&2
  "$@"
}

texts=
for file in $transfer; do texts="$texts $data/$file"; done
train=$data/sst2/train.jsonl.gz
dev=$data/sst2/dev.jsonl.gz

# $xdistil may be several words; none of the lists holds a name with white space.
# shellcheck disable=SC2086
[ -f "$out/reviews.txt" ] || {
  "${PYTHON:-python3}" "$(dirname "$0")/sentences.py" --limit "$sentences" --words 4 50 $texts \
    > "$out/reviews.txt.part"
  mv "$out/reviews.txt.part" "$out/reviews.txt"
}
# shellcheck disable=SC2086
run $xdistil teacher --task classification --model "$base" --train "$train" --dev "$dev" \
  --epochs 3 --lr 1e-4 -o "$out/teacher"
# shellcheck disable=SC2086
run $xdistil distill --task classification --teacher "$out/teacher" --train "$train" --dev "$dev" \
  --transfer "$out/reviews.txt" --student 50x100 --pooling max --schedule d1 --epochs 8 \
  --min-piece-count 2 --embedding-dtype float16 --cache "$out/cache" -o "$out/float32"
# shellcheck disable=SC2086
[ -d "$out/en-sentiment" ] || run $xdistil quantize "$out/float32" --dev "$dev" \
  -o "$out/en-sentiment"

size=$(cat "$out/en-sentiment"/* | wc -c)
echo "en-sentiment: $size bytes" >&2
[ "$size" -le 3000000 ] || { echo "en-sentiment is larger than 3 MB" >&2; exit 1; }

for model in teacher en-sentiment; do
  # shellcheck disable=SC2086
  run $xdistil eval "$out/$model" --data "$data/sst2/test.jsonl.gz" --json "$out/$model.sst2.json"
done
