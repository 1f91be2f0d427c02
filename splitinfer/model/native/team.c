/* The team of threads: see team.h.

   A waiting thread looks again and again for a few microseconds, then lets others have its core between two
   looks, and sleeps after half a millisecond: longer than Python takes from one call to the next, an answer from a
   node between them, and short enough that a process beside this one finds the cores free. */
#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

enum { MOST = 256, LOOKS = 64, AWAKE = 500000 /* nanoseconds */, GIVEN = 3000000 /* the same */, RESTS = 50 };

typedef struct {
    _Alignas(64) atomic_uint word; /* what waiting threads look at */
    atomic_int sleepers;
    pthread_mutex_t lock;
    pthread_cond_t changed;
} Bell;

#define BELL {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER}

static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER;
static int hired = 1;                   /* the threads there are, with the caller */
static Bell call = BELL, meeting = BELL; /* a call's number and its team's size in eight bits; meetings so far */
static struct {
    void (*work)(void *, Member *);
    void *arg;
} job;
static _Alignas(64) atomic_int arrived;
static struct { _Alignas(64) _Atomic int64_t next; } loop_at[LOOPS];

static void rest(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

int64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void ring(Bell *bell, unsigned word) {
    atomic_store(&bell->word, word);
    if (!atomic_load(&bell->sleepers)) return;
    pthread_mutex_lock(&bell->lock);
    pthread_cond_broadcast(&bell->changed);
    pthread_mutex_unlock(&bell->lock);
}

/* Returns the bell's word as soon as it is not `old`. */
static unsigned listen_for(Bell *bell, unsigned old) {
    unsigned word;
    for (int i = 0; i < LOOKS; i++, rest())
        if ((word = atomic_load_explicit(&bell->word, memory_order_acquire)) != old) return word;
    for (int64_t end = nanoseconds() + AWAKE; nanoseconds() < end; sched_yield())
        if ((word = atomic_load_explicit(&bell->word, memory_order_acquire)) != old) return word;
    pthread_mutex_lock(&bell->lock);
    atomic_fetch_add(&bell->sleepers, 1); /* before the look: whoever rings after it sees a sleeper */
    while ((word = atomic_load(&bell->word)) == old) pthread_cond_wait(&bell->changed, &bell->lock);
    atomic_fetch_sub(&bell->sleepers, 1);
    pthread_mutex_unlock(&bell->lock);
    return word;
}

void team_meet(const Member *member) {
    if (member->count == 1) return;
    unsigned before = atomic_load(&meeting.word);
    if (atomic_fetch_add(&arrived, 1) + 1 == member->count) {
        atomic_store(&arrived, 0);
        ring(&meeting, before + 1);
    } else
        listen_for(&meeting, before);
}

static void *worker(void *given) {
    const int index = (int)(intptr_t)given;
    for (unsigned seen = 0;;) { /* a new thread may be needed at once */
        seen = listen_for(&call, seen);
        Member member = {index, (int)(seen & 255) + 1, 0, 0};
        if (index >= member.count) continue;
        job.work(job.arg, &member);
        team_meet(&member);
    }
    return NULL;
}

/* After a fork there is nobody but the thread that forked. */
static void alone(void) {
    pthread_mutex_init(&busy, NULL);
    hired = 1;
    call = (Bell)BELL;
    meeting = (Bell)BELL;
    atomic_store(&arrived, 0);
}

/* Starts what is missing to so many threads; returns how many may be had. */
static int hire(int threads) {
    static int prepared;
    if (threads > MOST) threads = MOST;
    if (hired >= threads) return threads;
    if (!prepared) prepared = 1, pthread_atfork(NULL, NULL, alone);
    sigset_t every, before; /* signals are for the threads of whoever called */
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    for (pthread_t thread; hired < threads; hired++) {
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)hired)) break;
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return hired;
}

Member team_begin(int threads, void (*work)(void *, Member *), void *arg) {
    Member member = {0, 1, 0, 0};
    if (threads <= 1 || pthread_mutex_trylock(&busy)) return member;
    member.count = hire(threads);
    job.work = work;
    job.arg = arg;
    for (int i = 0; i < LOOPS; i++) atomic_store_explicit(&loop_at[i].next, 0, memory_order_relaxed);
    if (member.count > 1) ring(&call, ((atomic_load(&call.word) >> 8) + 1) << 8 | (unsigned)(member.count - 1));
    else pthread_mutex_unlock(&busy);
    return member;
}

void team_end(Member member, void (*work)(void *, Member *), void *arg) {
    work(arg, &member);
    team_part(member);
}

void team_part(Member member) {
    if (member.count == 1) return;
    team_meet(&member);
    pthread_mutex_unlock(&busy);
}

void team_run(int threads, void (*work)(void *, Member *), void *arg) {
    team_end(team_begin(threads, work, arg), work, arg);
}

void team_give_way(void) {
    static _Atomic int64_t not_before;
    const int64_t start = nanoseconds();
    if (start < atomic_load_explicit(&not_before, memory_order_relaxed)) return;
    sched_yield();
    const int64_t taken = nanoseconds() - start;
    /* Whoever keeps a core for so long is no node that has a row to answer. */
    if (taken > GIVEN) atomic_store_explicit(&not_before, start + RESTS * taken, memory_order_relaxed);
}

int team_loop(Member *member) { return member->loops++; }

int team_take(Member *member, int loop, int64_t total, int64_t most, int64_t *from, int64_t *to) {
    if (member->count == 1) { /* another thread's team may be at work */
        *from = 0;
        *to = total;
        return !(member->done & 1 << loop) && (member->done |= 1 << loop, total > 0);
    }
    int64_t taken = atomic_load_explicit(&loop_at[loop].next, memory_order_relaxed), size;
    do {
        if (taken >= total) return 0;
        size = (total - taken) / (2 * member->count);
        if (size > most) size = most;
        if (size < 1) size = 1;
    } while (!atomic_compare_exchange_weak_explicit(&loop_at[loop].next, &taken, taken + size,
                                                    memory_order_relaxed, memory_order_relaxed));
    *from = taken;
    *to = taken + size;
    return 1;
}
