# Llama-3.1-8B and Llama-3.1-8B-Instruct: source this file, then pass "${MODEL_ARGS[@]}".
MODEL_ARGS=(
    --num-layers 32
    --hidden-size 4096
    --ffn-hidden-size 14336
    --num-attention-heads 32
    --group-query-attention
    --num-query-groups 8
    --kv-channels 128
    --disable-bias-linear
    --swiglu
    --normalization RMSNorm
    --norm-epsilon 1e-5
    --position-embedding-type rope
    --rotary-base 500000
    --use-rope-scaling
    --rope-scaling-factor 8
    --vocab-size 128256
    --untie-embeddings-and-output-weights
)
