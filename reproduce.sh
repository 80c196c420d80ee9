#!/usr/bin/env bash
# The model in release/, made again: from raw files to int8 weights and figures, one command a stage.
#
#   ./reproduce.sh RAW [EVALUATION [SETTINGS]]
#   ./reproduce.sh data/raw 'kept_out.u64, questions.json'
#
# RAW holds the files that configs/release/{text,dialogues}.yaml name; leave out of those files the sets
# that you do not have. EVALUATION: texts or .u64 lists that must not be trained on, with commas between.
# SETTINGS: a YAML laid over those of all trainings; with configs/release/rehearsal.yaml and a few
# hundred rows of each set everything is done in minutes: ./reproduce.sh RAW '' configs/release/rehearsal.yaml
# Each stage may be stopped and started again with the same command; a finished one is not redone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
raw=${1:?"usage: ./reproduce.sh RAW [EVALUATION [SETTINGS]]"}
evaluation=${2:-}
settings=${3:-}
vocabulary=data/tokenizers/release.model
mean=out/release_mean
papers=data/raw/csl_papers

run() {
    echo "+ $*"
    "$@"
}

process() {
    run python -m data_process.run --config "configs/release/$1.yaml" --raw "$raw" \
        --evaluation "[$papers/dev.jsonl${evaluation:+, $evaluation}]" --engine processes "${@:2}"
}

train() {
    run python "$@" ${settings:+--config "$settings"}
}

run python -m data_process.csl_papers "$raw/csl/benchmark" --out "$papers"
process text
# Each release teaches the next: it gives titles to the abstracts that have none.
run python -m babyllama.own_titles release --rows data/clean/abstracts --out data/raw/own_titles --n 16
process dialogues
[ -e "$vocabulary" ] || run python tokenizer.py train --rows data/clean --vocab_size 8000 --out "$vocabulary"
process text --tokenizer "$vocabulary"
process dialogues --tokenizer "$vocabulary"

train pretrain.py --config data/mixtures/release_text.yaml --config configs/pretrain/release.yaml
train pretrain.py --config data/mixtures/release_text.yaml --config configs/pretrain/release_more.yaml
train sft.py --config data/mixtures/release_dialogues.yaml --config configs/sft/release.yaml
train sft.py --config configs/sft/release_titles.yaml
if ! compgen -G "$mean/step-*" > /dev/null; then
    rm -rf "$mean"
    run python -m babyllama.average out/release out/release_titles --out "$mean"
fi
[ -e "$mean/predictions.scores.json" ] || run python eval_rouge.py "$mean" \
    --data "$raw/csl/csl_title_public" --split dev --decoding greedy,consensus \
    --out "$mean/predictions.jsonl"

# The model card is written by hand; the rest of the directory is made anew.
[ ! -e release/README.md ] || cp release/README.md out/release_card.md
run python -m export.release "$mean" --out release --force --source csl_computing
cp out/release_card.md release/README.md
