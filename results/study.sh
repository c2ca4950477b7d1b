#!/usr/bin/env bash
# The commands of the study whose tables are in results/README.md. Run it from the root of the repository, and name the
# parts to run, or copy the lines that you want:
#
#     bash results/study.sh shapes large_eps
#
# The parts: shapes, confident; photograph_settings, photographs, published_networks, large_eps, how_far,
# photograph_ablation, photograph_cost, photograph_pictures; fashion_mnist. Those of photographs take minutes on a large
# GPU, or days on one processor core; the others together half a day on one core.
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


trained() {  # trained FOLDER/NAME FLAGS...: a training, its weights and metrics in results/
    python train.py --output-dir runs/$1 --resume "${@:2}"
    publish $1
}


# The quick start, and GradNorm from scratch: three seeds. Half an hour on one core, and as much for the attacks.

shapes() {
    local seed start
    for seed in 0 1 2; do
        start="--seed $seed --init runs/shapes/natural-$seed"
        trained shapes/natural-$seed --method natural --seed $seed
        trained shapes/gradnorm-$seed --method gradnorm $start
        trained shapes/adversarial-$seed --method adversarial $start
        trained shapes/difference-$seed --method gradnorm --h 2/255 $start
        trained shapes/scratch-$seed --method gradnorm --seed $seed
    done
    python evaluate.py results/shapes/*
    python evaluate.py results/shapes/*-0 --eps 4/255 --steps 100 --restarts 3 --num-images 200
    python evaluate.py results/shapes/{gradnorm,adversarial}-0 --eps 4/255 --steps 100 --restarts 3
    python evaluate.py results/shapes/{gradnorm,adversarial}-0 --attack autoattack --eps 4/255 --num-images 200
}


# The confident network: the same with true training labels, and its cure, label smoothing. Two seeds.

confident() {
    local seed start
    for seed in 0 1; do
        start="--dataset shapes-clean --seed $seed --init runs/shapes-clean/natural-$seed"
        trained shapes-clean/natural-$seed --method natural --dataset shapes-clean --seed $seed
        trained shapes-clean/gradnorm-$seed --method gradnorm $start
        trained shapes-clean/smooth-$seed --method gradnorm --label-smoothing 0.1 $start
        trained shapes-clean/difference-$seed --method gradnorm --h 2/255 $start
        trained shapes-clean/adversarial-$seed --method adversarial $start
    done
    python evaluate.py results/shapes-clean/* --eps 4/255 --steps 100 --restarts 3 --num-images 200
    python visualize.py loss results/shapes-clean/{natural,gradnorm,difference,smooth}-0 --output results/confident.png
}


photograph() {  # photograph FOLDER/NAME FLAGS...
    trained $1 --dataset imagenette --augment basic "${@:2}"
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
    local lr lambda smoothing
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
    for smoothing in 0.1 0.2; do
        setting gradnorm-smooth-$smoothing --method gradnorm --lr 2e-2 --label-smoothing $smoothing
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
    local smooth="--lr 2e-2 --label-smoothing 0.1 --eval-images 200 $start"
    SEEDS="0 1" seeds gradnorm-smooth --method gradnorm $smooth
    SEEDS=0 seeds difference-smooth --method gradnorm --h 2/255 $smooth
    SEEDS=0 seeds single-smooth --method adversarial --steps 1 $smooth
    SEEDS=0 seeds adversarial-smooth --method adversarial $smooth
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

# AutoAttack on more images, of networks whose weights are published. The finite difference with the paper's λ was
# trained once more for this, on a CPU.

published_networks() {
    photograph imagenette-cpu/finite-difference-1.2 --method gradnorm --h 2/255 --lr 2e-2 --epochs 20 \
        --init results/imagenette/natural-0 --eval-images 200
    python evaluate.py results/imagenette-cpu/finite-difference-1.2 --eps 4/255 --steps 20 --num-images 3925
    python evaluate.py results/imagenette/{natural,gradnorm,adversarial}-0 results/imagenette-cpu/finite-difference-1.2 \
        --attack autoattack --eps 4/255 --num-images 1024
}

# Does single-step training collapse at twice and four times the ε? Seed 0.

large() {  # large NAME EPS FLAGS...: EPS of 255
    photograph imagenette-large-eps/$1-$2 --eps $2/255 --epochs 30 --init results/imagenette/natural-0 \
        --eval-images 1000 "${@:3}"
    python evaluate.py results/imagenette-large-eps/$1-$2 --eps $(($2 / 2))/255 $2/255 --steps 20 --num-images 3925
}

large_eps() {
    large gradnorm 16 --method gradnorm
    large difference 16 --method gradnorm --h 8/255
    large single 16 --method adversarial --steps 1
    large adversarial 16 --method adversarial
    large single 8 --method adversarial --steps 1
    large gradnorm 8 --method gradnorm
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
}

photograph_pictures() {
    local difference=results/imagenette-cpu/finite-difference-1.2
    local four="results/imagenette/natural-0 results/imagenette/gradnorm-0 $difference results/imagenette/adversarial-0"
    python visualize.py gradients $four --output results/gradients.png
    python visualize.py loss $four --output results/loss.png
    python visualize.py attack results/imagenette/{natural,gradnorm}-0 --output results/attack.png
    python visualize.py accuracy results/imagenette/{natural,gradnorm,adversarial}-1 --output results/accuracy.png
    python visualize.py sweep results/imagenette/{natural,gradnorm,adversarial}-0 --output results/sweep.png
    python visualize.py epochs runs/imagenette/{natural,gradnorm,adversarial-1e-2}-0 --output results/epochs.png
}


# Fashion-MNIST: three seeds of each method, attacked on the test images.

fashion() {  # fashion NAME FLAGS...
    local name=$1 seed
    shift
    for seed in ${SEEDS:-0 1 2}; do
        python train.py --dataset fashion-mnist --eps 16/255 --epochs 20 --seed $seed --eval-images 1000 \
            --output-dir runs/fashion/$name-$seed --resume "$@"
    done
}

fashion_mnist() {
    fashion natural --method natural --amp bf16
    fashion gradnorm --method gradnorm --lr 4e-2 --amp bf16
    fashion adversarial --method adversarial --lr 4e-2 --amp bf16
    fashion difference --method gradnorm --h 8/255 --lr 4e-2
    fashion single --method adversarial --steps 1 --lr 4e-2
    python evaluate.py runs/fashion/* --eps 4/255 8/255 16/255 --steps 20 --num-images 10000
    python evaluate.py runs/fashion/* --attack autoattack --eps 4/255 8/255 16/255 --num-images 500
    for run in runs/fashion/*; do
        mkdir -p results/fashion/${run##*/}
        cp $run/*.json* results/fashion/${run##*/}
    done
}


if [ $# = 0 ]; then
    echo "Name the parts to run; the head of this file lists them." >&2
    exit 1
fi
for part in "$@"; do
    $part
done
