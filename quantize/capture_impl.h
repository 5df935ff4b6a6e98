/* What the parts of the calibration's forward pass share: capture.c has the blocks, capture_experts.c their experts. Nobody
 * else includes this. */
#ifndef GEMCUT_QUANTIZE_CAPTURE_IMPL_H
#define GEMCUT_QUANTIZE_CAPTURE_IMPL_H

#include "quantize/capture.h"
#include "quantize/donors.h"
#include "quantize/layer_inputs.h"
#include "runtime/experts.h"

/* Which experts the tokens go to in the layer that the pass is in. */
struct routes {
    int layer;                  /* whose they are; −1: of none yet */
    struct experts_room room;   /* of a batch */
    struct mat chosen, weights; /* I32, F32 [all tokens, top_k], on the device */
    int32_t *host, *picked;     /* of all tokens; of a batch, without those that are left out */
    int64_t *counts;            /* [experts]: tokens that were sent to it, but for those that are left out */
    struct extra_row *extra;    /* of a batch */
    int64_t max_extra;
    int64_t n_kept;  /* tokens of the text, but for those that are left out */
    int64_t *passed; /* [experts]: tokens of the batches before that could have been extra ones */
};

struct capture {
    struct weights *w;
    const struct dataset *data;
    struct capture_plan plan;
    int32_t skip_id;
    struct work_clock *clock;
    struct buf memory;
    struct states
        streams[N_STREAMS]; /* residual, at the block's beginning; [all tokens, …], as the next ones */
    struct states
        middle; /* residual, with attention's branch; where nothing is tuned, the first stream itself */
    struct states attention, inner;
    struct donors donors;
    struct layer_inputs inputs;
    struct routes routes;
    int layer;                                                /* whose states those of varying width are */
    struct block_input input;                                 /* of a batch; data NULL: layers have none */
    struct mat normed, branch, qkv, q, gate_up, keys, values; /* [tokens of a batch, …] */
    struct mat rope[GEMMA_KINDS];                             /* [length, head_dim] */
};

/* What one step works on, and the inputs that it ends with. */
struct step {
    struct capture *c;
    bool alone; /* all steps follow at once: nothing but the residual stream is kept */
    int layer;
    enum capture_stream stream;
    const struct token_batch *batch;
    const struct states *residual; /* where x is from, and where the block's result goes */
    struct mat x, attention, normed, branch, inner;
    struct mat spare; /* [tokens, …] for the inputs of o and down, weighed */
    const struct mat *inputs;
};

/* The batch after t, which begins as zeros; false: there is none. */
bool capture_next_batch(const struct capture *c, struct token_batch *t);

/* Memory of the routes: on the device, from an arena; on the host. */
void routes_lay_out(struct capture *c, void *base, uint64_t *at, const struct gemma_config *g, enum dtype act,
                    int64_t tokens, int64_t rows);
int routes_open(struct capture *c);
void routes_close(struct routes *r);

/* The end of a step: to the MLP's branch is added what the experts give. */
int routes_join(struct step *s);

#endif
