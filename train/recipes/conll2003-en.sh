#!/usr/bin/env bash
# CoNLL-2003 English: a teacher, a 100x200 student, and the same student from labels alone.
#
#   BASE=path/to/MiniLM conll2003-en.sh DATA_ROOT OUT
#
# DATA_ROOT holds conll2003/en/{train,dev,test}.conll.gz and the transfer text. Teacher, students
# and scores come to lie in OUT. Started again, it goes on where it was.
#
# Variables: BASE, a Hugging Face encoder (folder or Hub id); TRANSFER, unlabelled files below
# DATA_ROOT; XDISTIL, the command.
set -eu
[ $# -eq 2 ] || { echo "usage: BASE=ENCODER $0 DATA_ROOT OUT" >&2; exit 2; }
data=$1
out=$2
base=${BASE:-sentence-transformers/all-MiniLM-L6-v2}
transfer=${TRANSFER:-wikineural/en/train.conll.gz reuters-c50/unlabeled.txt.gz}
xdistil=${XDISTIL:-xdistil}
mkdir -p "$out"

run() {
  printf '+ %s\n' "$*" >&2
  "$@"
}

texts=
for file in $transfer; do texts="$texts $data/$file"; done
train=$data/conll2003/en/train.conll.gz
dev=$data/conll2003/en/dev.conll.gz

# $xdistil and $texts may be several words each.
# shellcheck disable=SC2086
run $xdistil teacher --model "$base" --train "$train" --dev "$dev" -o "$out/teacher"
# shellcheck disable=SC2086
run $xdistil distill --teacher "$out/teacher" --train "$train" --dev "$dev" --transfer $texts \
  --student 100x200 --cache "$out/cache" -o "$out/student"
# shellcheck disable=SC2086
run $xdistil distill --teacher "$out/teacher" --train "$train" --dev "$dev" --schedule d0-s \
  --student 100x200 --epochs 10 -o "$out/labels-only"

for model in teacher student labels-only; do
  for split in dev test; do
    # shellcheck disable=SC2086
    run $xdistil eval "$out/$model" --data "$data/conll2003/en/$split.conll.gz" \
      --json "$out/$model.$split.json"
  done
done
