#!/usr/bin/env bash
# Every command of the study whose tables are in results/README.md. Run it from the root of the repository, and name the
# parts to run, or copy the lines that you want:
#
#     bash results/study.sh twenty_epochs activation
#
# The parts: shapes; photograph_settings, photographs, on_a_cpu, large_eps, how_far, photograph_ablation,
# photograph_cost, photograph_pictures; twenty_epochs, ten_epochs, activation, optimiser, weight, h_and_k,
# learning_rates, step_sizes, lengths. Those of photographs take minutes on a large GPU, or days on one processor
# core; the others together about a day on one core.
#
# --amp bf16 is for processors with matrix units for bf16, and for GPUs; leave it out on others.

set -euo pipefail

# One core for each training, as when the times were measured; leave these lines out to train on all of them. The second
# makes the C library keep the memory that is freed, which would otherwise be cleared anew in every step.
export OMP_NUM_THREADS=1
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296


publish() {  # publish RUN: its weights and settings, without the state of the optimiser, into results/
    mkdir -p results/$1
    cp runs/$1/metrics.jsonl results/$1
    python -c 'import sys, torch, train
checkpoint = train.read_checkpoint(sys.argv[1])
torch.save({name: checkpoint[name] for name in ("model", "ema", "config", "epoch")}, sys.argv[2])' \
        runs/$1 results/$1/checkpoint.pt
}


# The published networks of shapes, in ten minutes.

shapes() {
    local method
    for method in natural gradnorm adversarial; do
        python train.py --method $method --output-dir runs/shapes/$method --resume
        publish shapes/$method
    done
    python evaluate.py results/shapes/{natural,gradnorm,adversarial}
}


# Photographs: a training, its weights and metrics in results/, and its evaluation.

photograph() {  # photograph FOLDER/NAME FLAGS...
    local name=$1
    shift
    python train.py --dataset imagenette --augment basic --output-dir runs/$name --resume "$@"
    publish $name
}

# How their settings were chosen: on 1,000 held-out training images of Imagenette, ten epochs from the weights of a
# natural training that has not seen them.

setting() {  # setting NAME FLAGS...
    local name=imagenette-settings/$1
    shift
    photograph $name --val-images 1000 --eval-images 200 --init results/imagenette-settings/natural --epochs 10 "$@"
    python evaluate.py results/$name --eps 4/255 --steps 20 --num-images 1000
}

photograph_settings() {
    local lr lambda
    photograph imagenette-settings/natural --method natural --epochs 30 --val-images 1000 --eval-images 200
    photograph imagenette-settings/natural-3e-3 --method natural --epochs 30 --lr 3e-3 --val-images 1000 \
        --eval-images 200
    python evaluate.py results/imagenette-settings/natural{,-3e-3} --attack clean --num-images 1000
    for lr in 1e-2 2e-2 4e-2; do
        setting gradnorm-$lr --method gradnorm --lr $lr
        setting difference-$lr --method gradnorm --h 2/255 --lr $lr
        setting single-$lr --method adversarial --steps 1 --lr $lr
        setting adversarial-$lr --method adversarial --lr $lr
    done
    for lambda in 0.6 0.9; do  # 1.2 is the default, at 1e-2
        setting gradnorm-$lambda --method gradnorm --lambda-gn $lambda
        setting difference-$lambda --method gradnorm --h 2/255 --lambda-gn $lambda
    done
    for lambda in 0.6 0.9 1.2; do
        setting every-2-$lambda --method gradnorm --h 2/255 --gradnorm-every 2 --lambda-gn $lambda
    done
    setting adversarial-20-epochs --method adversarial --lr 2e-2 --epochs 20  # at full length
    for lambda in 0.9 1.05 1.2; do
        setting difference-$lambda-20-epochs --method gradnorm --h 2/255 --lambda-gn $lambda --lr 2e-2 --epochs 20
        setting difference-$lambda-29-epochs --method gradnorm --h 2/255 --lambda-gn $lambda --lr 2e-2 --epochs 29
    done
}

# The first table: natural training, and 20 epochs of each method from its weights; three seeds, on the test images.

seeds() {  # seeds NAME FLAGS...: SEED in the flags is the seed
    local name=$1 seed
    shift
    for seed in ${SEEDS:-0 1 2}; do
        photograph imagenette/$name-$seed --seed $seed --eval-images $((seed ? 200 : 1000)) "${@//SEED/$seed}"
        python evaluate.py results/imagenette/$name-$seed --eps 4/255 --steps 20 --num-images 3925
    done
}

photographs() {
    local start="--init results/imagenette/natural-SEED --epochs 20"
    local difference="--method gradnorm --h 2/255 --lr 2e-2"
    seeds natural --method natural --epochs 30
    seeds gradnorm --method gradnorm --lr 2e-2 $start
    seeds gradnorm-tuned --method gradnorm --lambda-gn 0.9 --lr 2e-2 $start
    seeds difference $difference --lambda-gn 0.9 $start
    seeds difference-1.2 $difference --eval-images 200 $start
    seeds difference-long $difference --eval-images 200 $start --epochs 29
    seeds every-2 $difference --lambda-gn 0.9 --gradnorm-every 2 $start
    SEEDS="0 1" seeds every-2-1.2 $difference --gradnorm-every 2 --eval-images 200 $start
    seeds single --method adversarial --steps 1 --lr 2e-2 $start
    seeds single-long --method adversarial --steps 1 --lr 2e-2 --eval-images 200 $start --epochs 36
    seeds adversarial --method adversarial --lr 2e-2 --eval-images 200 $start
    seeds adversarial-1e-2 --method adversarial $start
    SEEDS=0 seeds adversarial-40 --method adversarial --lr 2e-2 --eval-images 200 $start --epochs 40
    SEEDS=0 seeds gradnorm-scratch --method gradnorm --lr 2e-2 --epochs 20 --eval-images 200
    SEEDS=0 seeds adversarial-scratch --method adversarial --epochs 20 --eval-images 200
    python evaluate.py results/imagenette/{natural,gradnorm,gradnorm-tuned,difference,difference-1.2}-[012] \
        results/imagenette/{difference-long,every-2,single,single-long,adversarial}-[012] \
        results/imagenette/{adversarial-1e-2,adversarial-40,gradnorm-scratch,adversarial-scratch}-0 \
        --attack autoattack --eps 4/255 --num-images 256
    python evaluate.py results/imagenette/{natural,gradnorm,difference,every-2,single,adversarial}-0 \
        --attack autoattack --eps 1/255 2/255 --num-images 256
    python evaluate.py results/imagenette/{natural,gradnorm,adversarial}-0 --sweep 32 --steps 100 --num-images 200
}

# The finite difference with the paper's λ once more, on a CPU: these weights are published.

on_a_cpu() {
    photograph imagenette-cpu/finite-difference-1.2 --method gradnorm --h 2/255 --lr 2e-2 --epochs 20 \
        --init results/imagenette/natural-0 --eval-images 200
    python evaluate.py results/imagenette-cpu/finite-difference-1.2 --eps 4/255 --steps 20 --num-images 3925
}

# Does single-step training collapse at twice and four times the ε? Seed 0.

large() {  # large NAME EPS FLAGS...: EPS of 255
    photograph imagenette-large-eps/$1-$2 --eps $2/255 --epochs 30 --init results/imagenette/natural-0 \
        --eval-images 1000 "${@:3}"
    python evaluate.py results/imagenette-large-eps/$1-$2 --eps $(($2 / 2))/255 $2/255 --steps 20 --num-images 3925
}

large_eps() {
    large single 16 --method adversarial --steps 1
    large gradnorm 16 --method gradnorm
    large difference 16 --method gradnorm --h 8/255
    large adversarial 16 --method adversarial
    large single 8 --method adversarial --steps 1
    large gradnorm 8 --method gradnorm
    python visualize.py accuracy results/imagenette-large-eps/{single,gradnorm,difference,adversarial}-16 \
        --output results/large_eps.png
}

# From double backprop to FGSM adversarial training: ten epochs, seed 0, on the test images.

how_far() {
    local h
    for h in 0 1 2 3 4; do
        photograph imagenette-h/$h --method gradnorm --lambda-ce 1 --lambda-gn 1 --h $h/255 --lr 2e-2 --epochs 10 \
            --init results/imagenette/natural-0 --eval-images 200
        python evaluate.py results/imagenette-h/$h --eps 4/255 --steps 20 --num-images 3925
    done
}

# The activation and the optimiser: ten epochs, seed 0, on the test images.

ablation() {  # ablation NAME FLAGS...
    photograph imagenette-ablation/$1 --epochs 10 --eval-images 200 "${@:2}"
}

photograph_ablation() {
    local method lr gelu="--init results/imagenette/natural-0" relu="--init results/imagenette-ablation/natural-relu"
    ablation natural-relu --method natural --activation relu --epochs 30
    for method in gradnorm adversarial; do
        for lr in 1e-2 2e-2; do
            ablation gelu-$lr-$method --method $method --lr $lr $gelu
            ablation relu-$lr-$method --method $method --lr $lr $relu
        done
        for lr in 0.1 0.3; do
            ablation sgd-$lr-$method --method $method --lr $lr --optimizer sgd --weight-decay 5e-4 $gelu
        done
    done
    python evaluate.py results/imagenette-ablation/* --eps 4/255 --steps 20 --num-images 3925
}

# Cost against robustness: seed 0 once more on the cores of one machine, two trainings at a time.

timed() {  # timed NAME FLAGS...
    photograph imagenette-cpu/$1 --init results/imagenette/natural-0 --epochs 20 --lr 2e-2 --eval-images 200 "${@:2}"
    python evaluate.py results/imagenette-cpu/$1 --eps 4/255 --steps 20 --num-images 1000
}

photograph_cost() {
    local difference="--method gradnorm --h 2/255 --lambda-gn 0.9"
    timed double-backprop --method gradnorm
    timed finite-difference $difference
    timed every-2nd-step $difference --gradnorm-every 2
    timed single-step --method adversarial --steps 1
    timed PGD-3 --method adversarial
    python visualize.py cost results/imagenette-cpu/{double-backprop,finite-difference,every-2nd-step} \
        results/imagenette-cpu/{single-step,PGD-3} --output results/cost.png
}

photograph_pictures() {
    python visualize.py gradients results/imagenette/{natural,gradnorm,adversarial}-0 --output results/gradients.png
    python visualize.py attack results/imagenette/{natural,gradnorm}-0 --output results/attack.png
    python visualize.py accuracy results/imagenette/{natural,gradnorm,adversarial}-1 --output results/accuracy.png
    python visualize.py sweep results/imagenette/{natural,gradnorm,adversarial}-0 --output results/sweep.png
    python visualize.py epochs runs/imagenette/{natural,gradnorm,adversarial-1e-2}-0 --output results/epochs.png
}


# The tables "Twenty epochs" and "Ten epochs": three seeds of each method, attacked on the test images.

study() {  # study FOLDER/NAME FLAGS...: one training for each seed
    local name=$1 seed
    shift
    for seed in ${SEEDS:-0 1 2}; do
        python train.py --dataset fashion-mnist --eps 16/255 --amp bf16 --seed $seed --output-dir runs/$name-$seed \
            --resume "$@"
    done
}

twenty_epochs() {
    study fashion/natural --method natural --epochs 20
    study fashion/gradnorm --method gradnorm --lr 4e-2 --epochs 20
    study fashion/adversarial --method adversarial --lr 4e-2 --epochs 20
    study fashion/difference --method gradnorm --h 8/255 --lr 4e-2 --epochs 20 --amp off
    study fashion/single --method adversarial --steps 1 --lr 4e-2 --epochs 20 --amp off
    python evaluate.py runs/fashion/*/checkpoint.pt --eps 4/255 8/255 16/255 --steps 20 --num-images 10000
    python evaluate.py runs/fashion/*/checkpoint.pt --attack autoattack --eps 4/255 8/255 16/255 --num-images 500
    python evaluate.py runs/fashion/{natural,gradnorm,adversarial}-0/checkpoint.pt --sweep 32 --steps 100 \
        --num-images 200
}

ten_epochs() {
    study fashion-10/natural --method natural --epochs 10
    study fashion-10/gradnorm --method gradnorm --lr 4e-2 --epochs 10
    study fashion-10/adversarial --method adversarial --lr 4e-2 --epochs 10
    python evaluate.py runs/fashion-10/*/checkpoint.pt --eps 4/255 8/255 16/255 --steps 20 --num-images 10000
    python evaluate.py runs/fashion-10/*/checkpoint.pt --attack autoattack --eps 4/255 8/255 16/255 --num-images 500
}


# The tables "Activation", "Optimiser and learning rate" and "λ_GN": five epochs, seed 0, 5,000 held-out training
# images.

ablate() {  # ablate NAME FLAGS...
    local name=$1
    shift
    python train.py --dataset fashion-mnist --eps 16/255 --amp bf16 --val-images 5000 --epochs 5 \
        --output-dir runs/ablation/$name --resume "$@"
}

activation() {
    local act
    for act in gelu silu relu; do
        ablate $act-natural --method natural --activation $act
        ablate $act-gradnorm --method gradnorm --activation $act --lr 4e-2
        ablate $act-difference --method gradnorm --activation $act --lr 4e-2 --h 16/255 --lambda-ce 1 --lambda-gn 1
        ablate $act-adversarial --method adversarial --activation $act --lr 4e-2
    done
    ablate relu-gradnorm-1e-2 --method gradnorm --activation relu --lr 1e-2
    python evaluate.py runs/ablation/{gelu,silu,relu}-*/checkpoint.pt --eps 16/255 --steps 20 --num-images 5000
}

optimiser() {  # AdamW at 4e-2 is gelu-gradnorm and gelu-adversarial of the part before
    local method lr
    for method in gradnorm adversarial; do
        for lr in 1e-2 2e-2 8e-2; do
            ablate adamw-$lr-$method --method $method --lr $lr
        done
        for lr in 0.03 0.1 0.3 1 2; do
            ablate sgd-$lr-$method --method $method --optimizer sgd --lr $lr --weight-decay 5e-4
        done
        ablate decay-$method --method $method --optimizer sgd --lr 0.1 --weight-decay 0.05
    done
    python evaluate.py runs/ablation/{adamw,sgd,decay}-*/checkpoint.pt --eps 16/255 --steps 20 --num-images 5000
}

weight() {  # 0 and 1.5 are gelu-natural and gelu-gradnorm of the part "activation"
    local lambda
    for lambda in 0.25 0.5 1 2 4 8; do
        ablate weight-$lambda --method gradnorm --lr 4e-2 --lambda-ce 1 --lambda-gn $lambda
    done
    python evaluate.py runs/ablation/weight-*/checkpoint.pt --eps 16/255 --steps 20 --num-images 5000
}


# The table "h and K": five epochs, three seeds, 2,000 of the 5,000 held-out images, in float32. `--h 0` is double
# backprop.

h_and_k() {
    local seed every h
    for seed in 0 1 2; do
        for every in 1 2 3; do
            for h in 0 4/255 8/255 16/255; do
                python train.py --dataset fashion-mnist --eps 16/255 --val-images 5000 --epochs 5 --seed $seed \
                    --method gradnorm --lambda-ce 1 --lambda-gn 1 --h $h --gradnorm-every $every \
                    --output-dir runs/h-and-k/h${h%/255}-every$every-$seed --resume
            done
        done
        python train.py --dataset fashion-mnist --eps 16/255 --val-images 5000 --epochs 5 --seed $seed \
            --method adversarial --output-dir runs/h-and-k/adversarial-$seed --resume
    done
    python evaluate.py runs/h-and-k/*/checkpoint.pt --eps 16/255 --steps 20 --num-images 2000
}


# "How the learning rates were chosen": seed 0, held-out training images; the first two parts in float32.

tune() {  # tune NAME FLAGS...
    local name=$1
    shift
    python train.py --dataset fashion-mnist --eps 16/255 --val-images 5000 --output-dir runs/tune/$name --resume "$@"
}

learning_rates() {
    local lr
    for lr in 1e-2 4e-2; do
        tune gradnorm-5-$lr --method gradnorm --epochs 5 --lr $lr
    done
    for lr in 5e-3 1e-2 2e-2 4e-2 8e-2; do
        tune adversarial-5-$lr --method adversarial --epochs 5 --lr $lr
    done
    for lr in 1e-2 2e-2 4e-2; do
        tune adversarial-10-$lr --method adversarial --epochs 10 --lr $lr
    done
    python evaluate.py runs/tune/{gradnorm,adversarial}-*/checkpoint.pt --eps 16/255 --steps 20 --num-images 2000
}

step_sizes() {  # 0.4ε and ε; the default, 2ε/3, is adversarial-5-4e-2 of the part before
    tune step-0.4eps --method adversarial --epochs 5 --lr 4e-2 --step-size 32/1275
    tune step-eps --method adversarial --epochs 5 --lr 4e-2 --step-size 16/255
    python evaluate.py runs/tune/step-*/checkpoint.pt --eps 16/255 --steps 20 --num-images 2000
}

lengths() {  # 5 epochs are gelu-adversarial of the part "activation"
    local seed
    for seed in 0 1 2; do
        tune length-10-$seed --method adversarial --lr 4e-2 --amp bf16 --epochs 10 --seed $seed
    done
    for seed in 0 1; do
        tune length-20-$seed --method adversarial --lr 4e-2 --amp bf16 --epochs 20 --seed $seed
    done
    tune length-40-0 --method adversarial --lr 4e-2 --amp bf16 --epochs 40
    python evaluate.py runs/tune/length-*/checkpoint.pt --eps 16/255 --steps 20 --num-images 5000
}


if [ $# = 0 ]; then
    echo "Name the parts to run; the head of this file lists them." >&2
    exit 1
fi
for part in "$@"; do
    $part
done
