#!/usr/bin/env bash
# The model in release/, made again: from raw files to int8 weights and figures, one command a stage.
#
#   release/recipe/reproduce.sh RAW [EVALUATION [SETTINGS]]
#   release/recipe/reproduce.sh data/raw 'kept_out.u64, questions.json'
#
# RAW holds the files that release/recipe/*.{yaml,py} name. EVALUATION: texts or .u64 lists that must not
# be trained on, with commas between. SETTINGS: a YAML laid over those of all trainings; with
# release/recipe/rehearsal.yaml and a few hundred rows of each set everything is done in minutes:
#   release/recipe/reproduce.sh RAW '' release/recipe/rehearsal.yaml
# Each stage may be stopped and started again with the same command; a finished one is not redone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
raw=${1:?"usage: release/recipe/reproduce.sh RAW [EVALUATION [SETTINGS]]"}
evaluation=${2:-}
settings=${3:-}
vocabulary=data/tokenizers/flagship.model
made=data/raw/recipe
papers=$made/csl_papers

run() {
    echo "+ $*"
    "$@"
}

process() {
    run python -m data_process.run --config "release/recipe/$1.yaml" --raw "$raw" \
        --evaluation "[$papers/dev.jsonl, $made/cnki/dev.jsonl${evaluation:+, $evaluation}]" \
        --engine processes "${@:2}"
}

train() {
    run python "$@" ${settings:+--config "$settings"}
}

score() {
    [ -e "out/flagship_scores/$1.scores.json" ] || run python eval_rouge.py release --data "$2" \
        --split dev --decoding greedy,best --out "out/flagship_scores/$1.jsonl"
}

kept_out=$(grep -oE '[^, ]+\.u64' <<< "$evaluation" | paste -sd, || true)
[ -e "$made/done" ] || { # once
    run python -m release.recipe.sets "$raw" --out "$made" ${kept_out:+--kept_out "[$kept_out]"}
    touch "$made/done"
}
for sets in text titles dialogues; do process "$sets"; done
talks=$(printf ', data/clean/%s' identity talk turns smalltalk short persona duconv kdconv diamante lccc smile)
run python -m release.recipe.openings --rows "[${talks:2}]"
mkdir -p "$(dirname "$vocabulary")"
[ -e "$vocabulary" ] || cp release/recipe/vocabulary.model "$vocabulary"
for sets in text titles dialogues; do process "$sets" --tokenizer "$vocabulary"; done

train pretrain.py --config release/recipe/pretrain/base.yaml
train pretrain.py --config release/recipe/pretrain/decay.yaml
train sft.py --config release/recipe/sft/chat.yaml
[ -e out/flagship_mean ] || # +1.6 ROUGE-1 on titles
    run python -m babyllama.tuning.average out/flagship_decay out/flagship --out out/flagship_mean

# Into a folder of its own first: beside the files in release/ stand the card and this recipe.
export_as() {
    run python -m export.release out/flagship_mean --out "out/flagship_$1" --force \
        --source title_computing --weights "$1" --max_mib "$2"
}
export_as int8 16
export_as float16 64
cp out/flagship_int8/* release/

score computing "$raw/csl/csl_title_public"
score papers "$papers"
score cnki "$made/cnki"
run python -m release.recipe.openings release --out out/flagship_scores/openings.jsonl
