#!/usr/bin/env bash
# The model in release/, made again: from raw files to int8 weights and figures, one command a stage.
#
#   ./reproduce.sh RAW [EVALUATION]
#
# RAW holds the files that configs/release/{text,dialogues}.yaml name; leave out of those files the sets
# that you do not have. EVALUATION: texts or .u64 lists that must not be trained on, '[a.tsv, b.u64]'.
# Each stage may be stopped and started again with the same command; a finished one is not redone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
raw=${1:?"usage: ./reproduce.sh RAW [EVALUATION]"}
evaluation=${2:-[]}
vocabulary=data/tokenizers/release.model

run() {
    echo "+ $*"
    "$@"
}

process() {
    run python -m data_process.run --config "configs/release/$1.yaml" --raw "$raw" \
        --evaluation "$evaluation" --engine processes "${@:2}"
}

process text
process dialogues
[ -e "$vocabulary" ] || run python tokenizer.py train --rows data/clean --vocab_size 8000 --out "$vocabulary"
process text --tokenizer "$vocabulary"
process dialogues --tokenizer "$vocabulary"

run python pretrain.py --config data/mixtures/release_text.yaml --config configs/pretrain/release.yaml
run python sft.py --config data/mixtures/release_dialogues.yaml --config configs/sft/release.yaml
run python sft.py --config configs/sft/release_titles.yaml
[ -e out/release_mean ] || run python -m babyllama.average out/release out/release_titles --out out/release_mean
run python eval_rouge.py out/release_mean --data "$raw/csl/csl_title_public" --split dev \
    --decoding greedy,consensus --out out/release_mean/predictions.jsonl
run python -m export.release out/release_mean --out release --force --source csl_computing
git checkout -q -- release/README.md # the card stays
