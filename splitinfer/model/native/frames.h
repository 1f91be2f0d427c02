/* Messages that lie ready but for what the kernels write into them. */
#ifndef SPLITINFER_FRAMES_H
#define SPLITINFER_FRAMES_H

#include <stdint.h>

/* `file` is the socket to which the message goes as soon as it is whole; -1 leaves that to the caller. `sent` bytes of
   it have gone: it is for the caller to send the others, and to find out why they did not go. */
typedef struct {
    const uint8_t *bytes;
    int64_t nbytes;
    int32_t file, sent;
} Frame;

/* What a node is asked about rows: x [rows, n], and the experts chosen, index and weights [rows, chosen], where `asked`
   (by expert; NULL: all) has them, -1 in place of others. `needed` comes back: whether there is any such. */
typedef struct {
    Frame frame;
    void *x;
    int16_t *index;
    float *weights;
    const uint8_t *asked;
    int64_t needed;
} Request;

/* A node's answer; `took` is where the microseconds of its arithmetic go, four bytes, the highest first. */
typedef struct {
    Frame frame;
    uint8_t *took;
} Answer;

/* An answer as it should come: as `pattern`, but for the four bytes at `number` and the sums at `body`. Whatever comes
   is read from `file` (-1: nothing is expected) into `room`, `received` bytes of it. `took` is the number, `seen` when
   it had come, in nanoseconds. A wait for it is spent looking for `awake` of them at most. */
typedef struct {
    const uint8_t *pattern;
    int64_t nbytes, number, body;
    uint8_t *room;
    int64_t size;
    int32_t file, received;
    int64_t awake, took, seen;
} Expected;

enum { MOST_ANSWERS = 16, SOMETHING_ELSE = -1 };

/* Those of `count`, at most MOST_ANSWERS, that have not come yet: waits for any of them for so many nanoseconds, and
   reads what there is. Returns how many are still missing, or SOMETHING_ELSE where that came. */
int splitinfer_answers_read(Expected *expected, int count, int64_t patience);
/* Whether there is anything to read of those. */
int answers_there(const Expected *expected, int count);
void splitinfer_request_send(Request *request, const void *x, int64_t nbytes, const int16_t *index,
                             const float *weights, int64_t places);
void answer_send(Answer *answer, int64_t duration);

#endif
