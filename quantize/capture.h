/* The calibration's forward pass, one block and within it one set of linears at a time: every linear sees what the
 * quantized ones before it give ("true sequential"), and yet each runs once. Between the steps the state of all tokens
 * is kept: the residual stream in FP32, and the inputs of the o projection and, where there is room, of the down
 * projection; on the device, or in pinned host memory where they do not fit.
 *
 * Where layers read the keys and values of an earlier one, those of all tokens are kept for them, of each stream its own;
 * where they have inputs of their own, those of every id that occurs.
 *
 * For a tuning the inputs of the block are kept until its end, and beside them runs a second residual stream, the
 * reference, that no quantized weight has touched. */
#ifndef GEMCUT_QUANTIZE_CAPTURE_H
#define GEMCUT_QUANTIZE_CAPTURE_H

#include "calib/dataset.h"
#include "quantize/work.h"
#include "runtime/block_grad.h"

struct capture;

/* What a pass will hold, and where. */
struct capture_plan {
    int64_t batch;       /* sequences at a time */
    bool states_on_host; /* residual stream and o's inputs */
    bool keep_inner;     /* the down projection's inputs are kept, not computed twice */
    bool tuned;          /* with the inputs of the block and the reference stream */
    int64_t n_ids;       /* different ones in the text, where layers have inputs of their own; else 0 */
    uint64_t device_bytes, host_bytes;
};

/* available: bytes of the device that the states and activations may take */
int capture_plan(struct capture_plan *out, const struct gemma_config *c, const struct backend *b,
                 const struct dataset *data, bool tuned, uint64_t available);

/* w: opened; the outer part is loaded for the embeddings and given back. skip_id: a token whose rows stay out of the
 * Hessians, e.g. <bos>, or −1. */
int capture_open(struct capture **out, struct weights *w, const struct dataset *data,
                 const struct capture_plan *plan, int32_t skip_id, struct work_clock *clock);
void capture_close(struct capture *c);

/* Brings all tokens to the inputs of a set of linears in `layer`, whose block is loaded, and adds them to the Hessian
 * (NULL: to none). The sets come in order, each once. */
int capture_inputs(struct capture *c, int layer, enum gemma_fused set, const struct mat *h);

/* Of a block with experts, when its other sets are done: sends all tokens to them. Then, for the gate and up of the experts
 * [first, first + n), or for their down, adds the inputs of each to its Hessian; h: one below the other. An expert that fewer
 * than a floor of tokens were sent to is given others, evenly from all the rest of the text, up to that; where tokens are
 * left out, up to its share of those that are not. */
int capture_route(struct capture *c, int layer);
int capture_expert_inputs(struct capture *c, int layer, enum gemma_fused set, int first, int n,
                          const struct mat *h);

/* Tokens of the text that the router sent to an expert, and how many each should have at least. */
int64_t capture_expert_tokens(const struct capture *c, int expert);
int64_t capture_expert_floor(const struct gemma_config *c, const struct dataset *data);

/* Brings all tokens to the end of the block. */
int capture_end(struct capture *c, int layer);

/* For a tuning, in place of capture_end: from a stream's inputs of the block to its end in one go, by the weights as they
 * are now. The reference first, before any of them is quantized; what capture_inputs has kept is lost. */
enum capture_stream { CAPTURE_INPUTS, CAPTURE_REFERENCE, N_STREAMS };
int capture_block(struct capture *c, int layer, enum capture_stream stream);

/* A sample's rows of a stream, F32 [length, hidden]: in place, or where the states are not on the device as a copy in
 * `spare`. */
int capture_sample(const struct capture *c, enum capture_stream stream, int64_t sample,
                   const struct mat *spare, struct mat *out);

/* What a block that has been entered reads of a sample, to sequence i of a tape of its: its inputs, and where it has such
 * its own input and its donor's keys and values of the stream CAPTURE_INPUTS. */
int capture_to_tape(const struct capture *c, int layer, int64_t sample, int64_t i,
                    const struct block_tape *tape);

/* The rotary table of a layer's positions. */
const struct mat *capture_rope(const struct capture *c, int layer);

#endif
