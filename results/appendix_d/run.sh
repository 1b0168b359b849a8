#!/bin/sh
# CIFAR-10 as in appendix D, on one GPU: sh results/appendix_d/run.sh SOURCE OUT SECONDS [FLAGS...]
# Stops when the time is over; the same command continues, bit for bit. FLAGS are added to every run:
# `--limit 600 --batch-size 64 --width 8 --epochs 1 --no-compile` tries everything in minutes on a
# laptop.
source=$1 out=$2 end=$(($(date +%s) + $3))
shift 3
left() { echo $((end - $(date +%s))); }

run() { # NAME FLAGS...
    name=$1
    shift
    [ -e "$out/$name/evaluations/linear.json" ] && return
    [ "$(left)" -gt 20 ] || exit 0
    if [ -e "$out/$name/recipe.yaml" ]; then
        timeout -s TERM "$(left)" simsiam resume "$out/$name"
    else
        timeout -s TERM "$(left)" simsiam pretrain "$source" --recipe cifar --holdout 0 --log-every 97 \
            --knn-every 25 --save-every 50 --save-seconds 300 --out "$out/$name" "$@"
    fi || exit 0
    simsiam evaluate "$out/$name" --protocol knn linear --no-baselines
}

run simsiam-200 --epochs 200 --compile "$@"
run simsiam-800 --epochs 800 --compile "$@"
run simclr-800 --method simclr --equal-terms --tau 0.5 --epochs 800 --compile "$@"
run simsiam-200-batch128 --epochs 200 --batch-size 128 --base-lr 0.12 --compile "$@"
run no-stopgrad-20 --no-stop-gradient --epochs 20 --compile "$@"
run no-predictor-100 --predictor none --epochs 100 --compile "$@"
run fixed-predictor-100 --predictor fixed --epochs 100 --compile "$@"
run predictor-cosine-100 --predictor-lr cosine --epochs 100 --compile "$@"
run simsiam-100 --epochs 100 --compile "$@"
