# Llama-3.1-70B and Llama-3.1-70B-Instruct, and Llama-3.3-70B-Instruct: source this file, then pass "${MODEL_ARGS[@]}".
MODEL_ARGS=(
    --num-layers 80
    --hidden-size 8192
    --ffn-hidden-size 28672
    --num-attention-heads 64
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
