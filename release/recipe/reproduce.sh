#!/usr/bin/env bash
# The model in release/, made again: from raw files to int8 weights and figures, one command a stage.
#
#   release/recipe/reproduce.sh RAW [EVALUATION [SETTINGS]]
#   release/recipe/reproduce.sh data/raw 'kept_out.u64, questions.json'
#
# RAW holds the files that release/recipe/{text,dialogues}.yaml name; leave out of those files the sets
# that you do not have. EVALUATION: texts or .u64 lists that must not be trained on, with commas between.
# SETTINGS: a YAML laid over those of all trainings; with release/recipe/rehearsal.yaml and a few
# hundred rows of each set everything is done in minutes: release/recipe/reproduce.sh RAW '' release/recipe/rehearsal.yaml
# Each stage may be stopped and started again with the same command; a finished one is not redone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
raw=${1:?"usage: release/recipe/reproduce.sh RAW [EVALUATION [SETTINGS]]"}
evaluation=${2:-}
settings=${3:-}
vocabulary=data/tokenizers/release.model
papers=data/raw/csl_papers

run() {
    echo "+ $*"
    "$@"
}

without="[$papers/dev.jsonl${evaluation:+, $evaluation}]"

process() {
    run python -m data_process.run --config "release/recipe/$1.yaml" --raw "$raw" \
        --evaluation "$without" --engine processes "${@:2}"
}

train() {
    run python "$@" ${settings:+--config "$settings"}
}

mean() {
    compgen -G "$1/step-*" > /dev/null || { rm -rf "$1"; run python -m babyllama.tuning.average "${@:2}" --out "$1"; }
}

publish() {
    run python -m export.release "$1" --out "$2" --force --source csl_computing
}

score() {
    local name=$1
    [ -e "out/release_scores/$name.scores.json" ] || run python eval_rouge.py "${@:2}" \
        --data "$raw/csl/csl_title_public" --split dev --no_repeat_ngram 3 --weights int8 \
        --out "out/release_scores/$name.jsonl"
}

run python -m release.recipe.csl_papers "$raw/csl/benchmark" --out "$papers"
process text
# Each release teaches the next: it gives titles to the abstracts that have none.
run python -m babyllama.tuning.pseudo_labels release --rows data/clean/abstracts --out data/raw/own_titles --n 16
process dialogues
[ -e "$vocabulary" ] || run python tokenizer.py train --rows data/clean --vocab_size 8000 --out "$vocabulary"
process text --tokenizer "$vocabulary"
process dialogues --tokenizer "$vocabulary"

train pretrain.py --config data/mixtures/release_text.yaml --config release/recipe/pretrain/release.yaml
train pretrain.py --config data/mixtures/release_text.yaml --config release/recipe/pretrain/release_more.yaml
train sft.py --config data/mixtures/release_dialogues.yaml --config release/recipe/sft/release.yaml
train sft.py --config release/recipe/sft/release_titles.yaml
train sft.py --config release/recipe/sft/release_direct.yaml
mean out/release_mean out/release out/release_titles out/release_direct
mean out/release_two out/release out/release_titles

# What three know together the last training teaches one: it learns the titles that they voted for.
run python -m babyllama.tuning.pseudo_labels out/release_mean out/release_direct out/release_two \
    --rows data/clean/abstracts --out data/raw/voted_titles --n 16 --limit 4000
run python -m data_process.run csl --name voted_titles --raw data/raw/voted_titles --official false \
    --evaluation "$without" --tokenizer "$vocabulary"
# Averaging forgets small talk, and single questions do not teach to answer a second one.
run python -m release.recipe.join_turns data/clean/identity --out data/raw/several_turns
run python -m data_process.run conversations --name several_turns --raw data/raw/several_turns \
    --official false --tokenizer "$vocabulary"
train sft.py --config release/recipe/sft/release_last.yaml

# The model card is written by hand; the rest of the directory is made anew.
[ ! -e release/README.md ] || cp release/README.md out/release_card.md
publish out/release_last release
publish out/release_direct release/second
publish out/release_two release/third
cp out/release_card.md release/README.md

score one release --decoding greedy,consensus
score all release release/second release/third --pool true --decoding consensus --n 64
