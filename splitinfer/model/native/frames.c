/* Messages that lie ready but for what the kernels write into them: see frames.h. */
#define _GNU_SOURCE /* ppoll */
#include "frames.h"
#include "team.h"

#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/socket.h>

/* What somebody who takes the core that is offered keeps it at least, in nanoseconds; so many times as long as he does
   nobody looks then. As in transport/polling.py. */
enum { TAKEN = 30000, RESTS = 50 };

static void frame_send(Frame *frame) {
    frame->sent = 0;
    if (frame->file < 0) return;
    const ssize_t sent = send(frame->file, frame->bytes, (size_t)frame->nbytes, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent > 0) frame->sent = (int32_t)sent;
}

void splitinfer_request_send(Request *request, const void *x, int64_t nbytes, const int16_t *index,
                             const float *weights, int64_t places) {
    const uint8_t *asked = request->asked;
    int64_t needed = 0;
    for (int64_t i = 0; i < places; i++) {
        const int mine = !asked || asked[index[i]];
        request->index[i] = mine ? index[i] : -1;
        needed |= mine;
    }
    request->needed = needed;
    request->frame.sent = 0;
    if (!needed) return;
    memcpy(request->x, x, (size_t)nbytes);
    memcpy(request->weights, weights, (size_t)places * sizeof *weights);
    frame_send(&request->frame);
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Reads on; returns whether that was no more than a part of what is expected. A row may come in pieces. */
static int answer_read(Expected *e) {
    const ssize_t received = recv(e->file, e->room + e->received, (size_t)(e->size - e->received), MSG_DONTWAIT);
    if (received <= 0) return 0;
    e->received += (int32_t)received;
    const uint8_t *number = e->room + e->number;
    const int64_t after = e->number + 4, rest = smaller(e->received, e->body) - after;
    if (e->received > e->nbytes || memcmp(e->room, e->pattern, (size_t)smaller(e->received, e->number)) ||
        (rest > 0 && memcmp(e->room + after, e->pattern + after, (size_t)rest)))
        return 0;
    if (e->received == e->nbytes) {
        e->took = (int64_t)number[0] << 24 | number[1] << 16 | number[2] << 8 | number[3];
        e->seen = nanoseconds();
    }
    return 1;
}

/* Those that are missing, for poll; returns how many they are. */
static int missing(const Expected *expected, int count, struct pollfd *files) {
    int n = 0;
    for (int i = 0; i < count; i++) {
        const int wanted = expected[i].file >= 0 && expected[i].received < expected[i].nbytes;
        files[i] = (struct pollfd){.fd = wanted ? expected[i].file : -1, .events = POLLIN};
        n += wanted;
    }
    return n;
}

int answers_there(const Expected *expected, int count) {
    struct pollfd files[MOST_ANSWERS];
    return missing(expected, count, files) && poll(files, (nfds_t)count, 0) > 0;
}

/* Looks again and again until something can be read or `end`, but lets others have the core between two looks: where
   one of them keeps it, waking up takes no longer than having it back, and for a while nobody looks. */
static int look(struct pollfd *files, int count, int64_t end) {
    static _Atomic int64_t not_before;
    for (int64_t now = nanoseconds(); now < end && now >= not_before;) {
        if (poll(files, (nfds_t)count, 0) > 0) return 1;
        sched_yield();
        const int64_t start = now;
        now = nanoseconds();
        if (now - start > TAKEN) not_before = now + RESTS * (now - start);
    }
    return 0;
}

int splitinfer_answers_read(Expected *expected, int count, int64_t patience) {
    struct pollfd files[MOST_ANSWERS];
    int left = missing(expected, count, files);
    const int64_t start = nanoseconds(), end = start + patience;
    int64_t awake = patience;
    for (int i = 0; i < count; i++)
        if (files[i].fd >= 0) awake = smaller(awake, expected[i].awake);
    if (!left) return 0;
    if (!look(files, count, start + awake)) {
        const int64_t rest = end - nanoseconds();
        const struct timespec most = {rest > 0 ? rest / 1000000000 : 0, rest > 0 ? rest % 1000000000 : 0};
        if (ppoll(files, (nfds_t)count, &most, NULL) <= 0) return left;
    }
    for (int i = 0; i < count; i++) {
        if (files[i].fd < 0 || !files[i].revents) continue;
        if (!answer_read(expected + i)) return SOMETHING_ELSE;
        left -= expected[i].received == expected[i].nbytes;
    }
    return left;
}

void answer_send(Answer *answer, int64_t duration) {
    const uint32_t took = duration / 1000 < UINT32_MAX ? (uint32_t)(duration / 1000) : UINT32_MAX;
    for (int i = 0; i < 4; i++) answer->took[i] = (uint8_t)(took >> (24 - 8 * i));
    frame_send(&answer->frame);
}
