/* A team of threads for one call's work, which wait for each other awake: a layer has twenty places where they
   meet, and waking a sleeper takes longer than what lies between them. See team.c. */
#ifndef SPLITINFER_TEAM_H
#define SPLITINFER_TEAM_H

#include <stdint.h>

int64_t nanoseconds(void); /* of the monotonic clock */

/* One thread's place in a run of the team; `loops` are those that it has named. */
typedef struct {
    int index, count, loops, done; /* done: bits of loops that a thread on its own has been through */
} Member;

/* Runs work(arg, member) on `threads` threads, this one among them, and returns when all have. Alone if the team
   is busy with another thread's call: no result depends on how many they are. */
void team_run(int threads, void (*work)(void *arg, Member *member), void *arg);

/* The same in two steps. The other threads begin; this one is free until it joins them in `team_end`, with the same
   work, and nobody else has the team meanwhile. */
Member team_begin(int threads, void (*work)(void *arg, Member *member), void *arg);
void team_end(Member member, void (*work)(void *arg, Member *member), void *arg);
void team_part(Member member); /* in place of the second, by who has done that work itself */

/* Lets somebody else have this core: for work in pieces of some ten microseconds, beside a node on this machine,
   which wakes up for a moment at a time and is waited for. */
void team_give_way(void);

/* Returns when every member is here. */
void team_meet(const Member *member);

/* Where this member's share of `total` things begins (`end` 0) or ends (1); shares are runs of about one
   size, and a single thing is the caller's. */
static inline int64_t team_share(const Member *member, int64_t total, int end) {
    return (total * (member->index + end) + member->count - 1) / member->count;
}

/* A loop over `total` things whose runs are taken while it goes, longer ones first: every member names it by
   `team_loop`, at most LOOPS times in one run of the team, and works through *from to *to - 1 as long as
   `team_take` returns 1. A run is no longer than `most`, but where there is one member. */
enum { LOOPS = 8 };
int team_loop(Member *member);
int team_take(Member *member, int loop, int64_t total, int64_t most, int64_t *from, int64_t *to);

#endif
