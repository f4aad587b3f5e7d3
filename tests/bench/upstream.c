/* upstream: a very cheap model server. One thread, epoll, a heap of due times. The path says in which dialect it answers:
 * chat completions; Messages where it ends in /messages; Responses where it ends in /responses.
 *
 *   upstream PORT      (0: any free port; the port it got is the first line on stdout)
 *
 * How to answer is asked for in the request's body, so that it survives any proxy: a text, anywhere in it, like
 *   [[events=200 gap_ms=50 burst=1 bytes=80 first_ms=0]]
 * events: content events of a stream · gap_ms: pause between two bursts of one stream · burst: events per write ·
 * bytes: text of an event beside its time stamp · first_ms: pause before the first byte. A body with `"stream": true` is
 * answered with a stream, any other with one JSON object of as many stamps and as much text.
 *
 * Each event carries `@` + 16 digits + `@`, the microseconds of CLOCK_MONOTONIC at which it was written, and the last
 * one ends in "The end.". Stamps of one stream strictly increase: what repeats a text at its end (Responses does, four
 * times) can so be told from the text itself. After the first burst a stream with a gap waits a *random* part of it once, so that many
 * streams begun together do not tick together: 500 streams of 50 ms are 10,000 lone events a second, not 20 volleys.
 *
 * GET /stats answers how many connections, requests, streams and events there have been; any other GET lists the model.
 *
 * Ugly: requests are found by substring, not parsed; pipelining is served but in order and one at a time.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum {
    STAMP_DIGITS = 16,
    MAX_EVENT_BYTES = 8192,
    MAX_ANSWER_BYTES = 1 << 20,
    FIRST_INPUT_BYTES = 4096,
    KEPT_INPUT_BYTES = 1 << 16,
    MAX_INPUT_BYTES = 64 << 20,
    EVENTS_PER_POLL = 512,
    BACKLOG = 8192,
};

typedef struct {
    char *bytes;
    size_t length, room;
} text;

typedef struct {
    long events, gap_ms, burst, bytes, first_ms;
} behaviour;

typedef enum { CHAT, MESSAGES, RESPONSES } dialect_t;
typedef enum { READING, STARTING_JSON, STARTING_STREAM, STREAMING, CLOSED } phase_t;

typedef struct connection {
    int fd, wants_write, jittered;
    phase_t phase;
    text in, out;
    size_t out_sent;
    behaviour asked;
    long events_sent;
    dialect_t dialect;
    text said;         /* of a Responses stream: all of its text so far */
    uint64_t stamp_us; /* the last one written */
    uint64_t due_us;
    long heap_place; /* -1: not waiting for a time */
} connection;

static struct {
    unsigned long long connections, requests, streams, events;
} totals;

static int poller, timer;
static connection **heap;
static long heap_count, heap_room;
static connection *graveyard[EVENTS_PER_POLL * 4]; /* closed in this turn; freed when no event can name them any more */
static int graves;
static uint64_t random_state = 0x2545f4914f6cdd1du;

static uint64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

static double draw(void) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return (double)(random_state >> 11) / 9007199254740992.0;
}

static void reserve(text *t, size_t more) {
    if (t->length + more <= t->room) return;
    t->room = (t->length + more) * 2;
    t->bytes = realloc(t->bytes, t->room);
    if (!t->bytes) abort();
}

static void append(text *t, const char *bytes, size_t n) {
    reserve(t, n);
    memcpy(t->bytes + t->length, bytes, n);
    t->length += n;
}

static void append_line(text *t, const char *line) { append(t, line, strlen(line)); }

/* --- the heap: who is due next ------------------------------------------------------------------------------------ */

static void put(long place, connection *c) {
    heap[place] = c;
    c->heap_place = place;
}

static void sift(connection *c, long place) {
    while (place > 0 && heap[(place - 1) / 2]->due_us > c->due_us) {
        put(place, heap[(place - 1) / 2]);
        place = (place - 1) / 2;
    }
    for (long child; (child = 2 * place + 1) < heap_count; place = child) {
        if (child + 1 < heap_count && heap[child + 1]->due_us < heap[child]->due_us) child++;
        if (heap[child]->due_us >= c->due_us) break;
        put(place, heap[child]);
    }
    put(place, c);
}

static void wait_until(connection *c, uint64_t due_us) {
    c->due_us = due_us;
    if (c->heap_place >= 0) {
        sift(c, c->heap_place);
        return;
    }
    if (heap_count == heap_room) {
        heap_room = heap_room ? heap_room * 2 : 1024;
        heap = realloc(heap, (size_t)heap_room * sizeof *heap);
        if (!heap) abort();
    }
    sift(c, heap_count++);
}

static void wait_no_more(connection *c) {
    long place = c->heap_place;
    if (place < 0) return;
    c->heap_place = -1;
    connection *last = heap[--heap_count];
    if (last != c) sift(last, place);
}

static void arm_timer(void) {
    static uint64_t armed_us;
    uint64_t due_us = heap_count ? heap[0]->due_us : 0;
    if (due_us == armed_us && due_us > now_us()) return;
    struct itimerspec at = {.it_value = {.tv_sec = (time_t)(due_us / 1000000), .tv_nsec = (long)(due_us % 1000000) * 1000}};
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL);
    armed_us = due_us;
}

/* --- connections -------------------------------------------------------------------------------------------------- */

static void watch(connection *c, int wants_write) {
    if (c->wants_write == wants_write) return;
    struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP | (wants_write ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &e);
    c->wants_write = wants_write;
}

static void bury(void) {
    while (graves) {
        connection *c = graveyard[--graves];
        free(c->in.bytes);
        free(c->out.bytes);
        free(c->said.bytes);
        free(c);
    }
}

static void close_connection(connection *c) {
    if (c->phase == CLOSED) return;
    c->phase = CLOSED;
    wait_no_more(c);
    close(c->fd);
    graveyard[graves++] = c;
}

/* True when all that was to be said has been handed to the kernel. */
static int flush(connection *c) {
    while (c->out_sent < c->out.length) {
        ssize_t n = send(c->fd, c->out.bytes + c->out_sent, c->out.length - c->out_sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) {
            watch(c, 1);
            return 0;
        }
        if (n < 0) {
            close_connection(c);
            return 0;
        }
        c->out_sent += (size_t)n;
    }
    c->out.length = c->out_sent = 0;
    watch(c, 0);
    return 1;
}

/* --- answers ------------------------------------------------------------------------------------------------------ */

static const char STREAM_HEAD[] =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    "X-Request-Id: req_0123456789abcdef\r\nTransfer-Encoding: chunked\r\n\r\n";
static const char CHUNK_START[] =
    "{\"id\":\"chatcmpl-0123456789abcdef\",\"object\":\"chat.completion.chunk\",\"created\":1750000000,\"model\":\"mock\",\"choices\":";
static const char WORDS[] = "the quick brown fox jumps over the lazy dog and then ";
static const char LAST_WORDS[] = " The end.";

/* One SSE event as one HTTP chunk, which is how the usual servers send it. */
static void append_event(text *out, const char *data, size_t n) {
    char size[24];
    append(out, size, (size_t)snprintf(size, sizeof size, "%zx\r\n", n + 8));
    append_line(out, "data: ");
    append(out, data, n);
    append_line(out, "\n\n\r\n");
}

static size_t write_words(char *to, long bytes) {
    for (long i = 0; i < bytes; i++) to[i] = WORDS[i % (long)(sizeof WORDS - 1)];
    return (size_t)bytes;
}

static size_t write_stamp(connection *c, char *to) {
    uint64_t stamp = now_us();
    if (stamp <= c->stamp_us) stamp = c->stamp_us + 1;
    c->stamp_us = stamp;
    to[0] = to[STAMP_DIGITS + 1] = '@';
    for (int i = STAMP_DIGITS; i > 0; i--, stamp /= 10) to[i] = (char)('0' + stamp % 10);
    return STAMP_DIGITS + 2;
}

static size_t write_text(char *to, const char *from) {
    size_t n = strlen(from);
    memcpy(to, from, n);
    return n;
}

/* One event with a name, its data in up to three parts: what comes before a text, the text, what comes after. */
static void append_named(text *out, const char *name, const char *before, const char *bytes, size_t n, const char *after) {
    char size[24];
    size_t length = strlen(name) + strlen(before) + n + strlen(after) + 16; /* "event: " + "\ndata: " + "\n\n" */
    append(out, size, (size_t)snprintf(size, sizeof size, "%zx\r\n", length));
    append_line(out, "event: ");
    append_line(out, name);
    append_line(out, "\ndata: ");
    append_line(out, before);
    append(out, bytes, n);
    append_line(out, after);
    append_line(out, "\n\n\r\n");
}

static void append_plain(text *out, const char *name, const char *data) { append_named(out, name, data, "", 0, ""); }

static void append_content_event(connection *c) {
    static char data[MAX_EVENT_BYTES + 512];
    size_t start = 0;
    if (c->dialect == CHAT) {
        start = write_text(data, CHUNK_START);
        start += write_text(data + start, "[{\"index\":0,\"delta\":{\"content\":\"");
    }
    size_t n = start + write_stamp(c, data + start);
    n += write_words(data + n, c->asked.bytes);
    if (++c->events_sent == c->asked.events) n += write_text(data + n, LAST_WORDS);
    if (c->dialect == CHAT) {
        n += write_text(data + n, "\"},\"finish_reason\":null}]}");
        append_event(&c->out, data, n);
    } else if (c->dialect == MESSAGES) {
        append_named(&c->out, "content_block_delta",
                     "{\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"", data, n, "\"}}");
    } else {
        char before[256];
        snprintf(before, sizeof before,
                 "{\"type\":\"response.output_text.delta\",\"sequence_number\":%ld,\"item_id\":\"msg_0123456789abcdef\","
                 "\"output_index\":0,\"content_index\":0,\"delta\":\"", c->events_sent + 3);
        append_named(&c->out, "response.output_text.delta", before, data, n, "\",\"logprobs\":[]}");
        append(&c->said, data, n);
    }
    totals.events++;
}

#define RESPONSE_START "\"response\":{\"id\":\"resp_0123456789abcdef\",\"object\":\"response\",\"created_at\":1750000000,\"model\":\"mock\","
#define ITEM_START "\"item\":{\"id\":\"msg_0123456789abcdef\",\"type\":\"message\",\"role\":\"assistant\","
#define PART_START "\"part\":{\"type\":\"output_text\",\"annotations\":[],\"logprobs\":[],\"text\":\""
#define OF_ITEM "\"item_id\":\"msg_0123456789abcdef\",\"output_index\":0,\"content_index\":0,"

static void append_opening(connection *c) {
    append_line(&c->out, STREAM_HEAD);
    if (c->dialect == CHAT) {
        char data[512];
        int n = snprintf(data, sizeof data, "%s[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}", CHUNK_START);
        append_event(&c->out, data, (size_t)n);
    } else if (c->dialect == MESSAGES) {
        append_plain(&c->out, "message_start",
                     "{\"type\":\"message_start\",\"message\":{\"id\":\"msg_0123456789abcdef\",\"type\":\"message\",\"role\":\"assistant\","
                     "\"model\":\"mock\",\"content\":[],\"stop_reason\":null,\"stop_sequence\":null,"
                     "\"usage\":{\"input_tokens\":90,\"output_tokens\":1}}}");
        append_plain(&c->out, "content_block_start",
                     "{\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}");
        append_plain(&c->out, "ping", "{\"type\":\"ping\"}");
    } else {
        c->said.length = 0;
        append_plain(&c->out, "response.created",
                     "{\"type\":\"response.created\",\"sequence_number\":0," RESPONSE_START "\"status\":\"in_progress\",\"output\":[],\"usage\":null}}");
        append_plain(&c->out, "response.in_progress",
                     "{\"type\":\"response.in_progress\",\"sequence_number\":1," RESPONSE_START "\"status\":\"in_progress\",\"output\":[],\"usage\":null}}");
        append_plain(&c->out, "response.output_item.added",
                     "{\"type\":\"response.output_item.added\",\"sequence_number\":2,\"output_index\":0," ITEM_START "\"status\":\"in_progress\",\"content\":[]}}");
        append_plain(&c->out, "response.content_part.added",
                     "{\"type\":\"response.content_part.added\",\"sequence_number\":3," OF_ITEM PART_START "\"}}");
    }
}

static void append_chat_closing(connection *c) {
    char data[512];
    int n = snprintf(data, sizeof data, "%s[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}", CHUNK_START);
    append_event(&c->out, data, (size_t)n);
    n = snprintf(data, sizeof data, "%s[],\"usage\":{\"prompt_tokens\":90,\"completion_tokens\":%ld,\"total_tokens\":%ld}}",
                 CHUNK_START, c->asked.events, c->asked.events + 90);
    append_event(&c->out, data, (size_t)n);
    append_event(&c->out, "[DONE]", 6);
}

static void append_messages_closing(connection *c) {
    char data[256];
    append_plain(&c->out, "content_block_stop", "{\"type\":\"content_block_stop\",\"index\":0}");
    snprintf(data, sizeof data, "{\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\",\"stop_sequence\":null},\"usage\":{\"output_tokens\":%ld}}",
             c->asked.events);
    append_plain(&c->out, "message_delta", data);
    append_plain(&c->out, "message_stop", "{\"type\":\"message_stop\"}");
}

static void append_responses_closing(connection *c) {
    char last[256];
    append_named(&c->out, "response.output_text.done", "{\"type\":\"response.output_text.done\",\"sequence_number\":1000001," OF_ITEM "\"logprobs\":[],\"text\":\"",
                 c->said.bytes, c->said.length, "\"}");
    append_named(&c->out, "response.content_part.done", "{\"type\":\"response.content_part.done\",\"sequence_number\":1000002," OF_ITEM PART_START,
                 c->said.bytes, c->said.length, "\"}}");
    append_named(&c->out, "response.output_item.done",
                 "{\"type\":\"response.output_item.done\",\"sequence_number\":1000003,\"output_index\":0," ITEM_START
                 "\"status\":\"completed\",\"content\":[{\"type\":\"output_text\",\"annotations\":[],\"logprobs\":[],\"text\":\"",
                 c->said.bytes, c->said.length, "\"}]}}");
    snprintf(last, sizeof last,
             "\"}]}],\"usage\":{\"input_tokens\":90,\"input_tokens_details\":{\"cached_tokens\":0},\"output_tokens\":%ld,"
             "\"output_tokens_details\":{\"reasoning_tokens\":0},\"total_tokens\":%ld}}}", c->asked.events, c->asked.events + 90);
    append_named(&c->out, "response.completed",
                 "{\"type\":\"response.completed\",\"sequence_number\":1000004," RESPONSE_START "\"status\":\"completed\",\"output\":["
                 "{\"id\":\"msg_0123456789abcdef\",\"type\":\"message\",\"role\":\"assistant\",\"status\":\"completed\","
                 "\"content\":[{\"type\":\"output_text\",\"annotations\":[],\"logprobs\":[],\"text\":\"",
                 c->said.bytes, c->said.length, last);
}

static void append_closing(connection *c) {
    static void (*const CLOSINGS[])(connection *) = {append_chat_closing, append_messages_closing, append_responses_closing};
    CLOSINGS[c->dialect](c);
    append_line(&c->out, "0\r\n\r\n");
}

static void stream_burst(connection *c) {
    if (c->phase == STARTING_STREAM) append_opening(c);
    c->phase = STREAMING;
    for (long i = 0; i < c->asked.burst && c->events_sent < c->asked.events; i++) append_content_event(c);
    int ended = c->events_sent >= c->asked.events;
    if (ended) {
        append_closing(c);
        c->phase = READING;
    }
    if (!flush(c) || ended) return; /* a full socket: EPOLLOUT goes on */
    uint64_t gap_us = (uint64_t)c->asked.gap_ms * 1000;
    if (gap_us && !c->jittered) {
        c->jittered = 1;
        wait_until(c, c->due_us + (uint64_t)((double)gap_us * draw()));
    } else {
        wait_until(c, gap_us ? c->due_us + gap_us : now_us());
    }
}

static void answer_bytes(connection *c, const char *content, size_t n) {
    char head[256];
    append(&c->out, head, (size_t)snprintf(head, sizeof head,
           "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Request-Id: req_0123456789abcdef\r\nContent-Length: %zu\r\n\r\n", n));
    append(&c->out, content, n);
    c->phase = READING;
    flush(c);
}

static void answer_json(connection *c) {
    static char json[MAX_ANSWER_BYTES];
    size_t n = write_text(json, "{\"id\":\"chatcmpl-0123456789abcdef\",\"object\":\"chat.completion\",\"created\":1750000000,\"model\":\"mock\","
                                "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"");
    for (long i = 0; i < c->asked.events && n + (size_t)c->asked.bytes + 1024 < sizeof json; i++) {
        n += write_stamp(c, json + n);
        n += write_words(json + n, c->asked.bytes);
    }
    n += write_text(json + n, LAST_WORDS);
    n += (size_t)snprintf(json + n, sizeof json - n,
                          "\"},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":90,\"completion_tokens\":%ld,\"total_tokens\":%ld}}",
                          c->asked.events, c->asked.events + 90);
    answer_bytes(c, json, n);
}

static void answer_get(connection *c) {
    char json[256];
    int n;
    if (!memcmp(c->in.bytes, "GET /stats", 10))
        n = snprintf(json, sizeof json, "{\"connections\":%llu,\"requests\":%llu,\"streams\":%llu,\"events\":%llu}",
                     totals.connections, totals.requests, totals.streams, totals.events);
    else
        n = snprintf(json, sizeof json, "{\"object\":\"list\",\"data\":[{\"id\":\"mock\",\"object\":\"model\",\"created\":1750000000,\"owned_by\":\"mock\"}]}");
    answer_bytes(c, json, (size_t)n);
}

/* --- requests ----------------------------------------------------------------------------------------------------- */

static long number(const char *from, const char *end, const char *name, long otherwise, long most) {
    const char *found = memmem(from, (size_t)(end - from), name, strlen(name));
    long value = found ? atol(found + strlen(name)) : otherwise;
    return value < 0 ? 0 : value > most ? most : value;
}

static behaviour read_behaviour(const char *body, size_t n) {
    const char *from = memmem(body, n, "[[events=", 9), *end = from ? memmem(from, (size_t)(body + n - from), "]]", 2) : NULL;
    if (!end) from = end = body;
    behaviour asked = {
        .events = number(from, end, "events=", 16, 1000000),
        .gap_ms = number(from, end, "gap_ms=", 0, 600000),
        .burst = number(from, end, "burst=", 16, 1000),
        .bytes = number(from, end, "bytes=", 80, MAX_EVENT_BYTES),
        .first_ms = number(from, end, "first_ms=", 0, 600000),
    };
    if (!asked.burst) asked.burst = 1;
    return asked;
}

static int asks_for_stream(const char *body, size_t n) {
    static const char NAME[] = "\"stream\":";
    const char *found = memmem(body, n, NAME, sizeof NAME - 1), *end = body + n;
    if (!found) return 0;
    for (found += sizeof NAME - 1; found < end && *found == ' ';) found++;
    return end - found >= 4 && !memcmp(found, "true", 4);
}

static dialect_t dialect_of(connection *c) {
    const char *path_end = memmem(c->in.bytes, c->in.length, " HTTP/1.", 8);
    if (path_end && path_end - c->in.bytes > 10 && !memcmp(path_end - 9, "/messages", 9)) return MESSAGES;
    if (path_end && path_end - c->in.bytes > 11 && !memcmp(path_end - 10, "/responses", 10)) return RESPONSES;
    return CHAT;
}

static void answer(connection *c, const char *body, size_t n) {
    totals.requests++;
    c->dialect = dialect_of(c);
    c->stamp_us = 0;
    if (!memcmp(c->in.bytes, "GET ", 4)) {
        answer_get(c);
        return;
    }
    c->asked = read_behaviour(body, n);
    c->phase = STARTING_JSON;
    c->due_us = now_us() + (uint64_t)c->asked.first_ms * 1000;
    if (asks_for_stream(body, n)) {
        totals.streams++;
        c->events_sent = 0;
        c->jittered = 0;
        c->phase = STARTING_STREAM;
    }
    if (c->asked.first_ms) wait_until(c, c->due_us);
    else if (c->phase == STARTING_JSON) answer_json(c);
    else stream_burst(c);
}

/* Joins the chunks of a body in place. Returns the bytes used on the wire, 0 while it is not whole. */
static size_t join_chunks(char *body, size_t n, size_t *length) {
    *length = 0;
    for (int writing = 0; writing < 2; writing++) {
        size_t at = 0, joined = 0;
        for (;;) {
            char *line_end = memchr(body + at, '\n', n - at);
            if (!line_end) return 0;
            size_t size = strtoul(body + at, NULL, 16), data = (size_t)(line_end - body) + 1;
            if (data + size + 2 > n) return 0;
            if (writing) memmove(body + joined, body + data, size);
            joined += size;
            at = data + size + 2;
            if (size) continue;
            *length = joined;
            if (writing) return at;
            break; /* whole: once more, now moving bytes */
        }
    }
    return 0;
}

static char *header(connection *c, size_t head_length, const char *name) {
    size_t n = strlen(name);
    for (char *line = c->in.bytes, *end = c->in.bytes + head_length - 2; line && line < end;) {
        if (!strncasecmp(line, name, n)) return line + n;
        line = memmem(line, (size_t)(end - line), "\r\n", 2);
        if (line) line += 2;
    }
    return NULL;
}

/* Takes one whole request out of what has been read and answers it; false if there is none. */
static int take_request(connection *c) {
    char *head_end = memmem(c->in.bytes, c->in.length, "\r\n\r\n", 4);
    if (!head_end) return 0;
    size_t head_length = (size_t)(head_end - c->in.bytes) + 4, have = c->in.length - head_length, used, length;
    char *body = c->in.bytes + head_length, *stated = header(c, head_length, "content-length:");
    if (header(c, head_length, "transfer-encoding:")) {
        used = join_chunks(body, have, &length);
        if (!used) return 0;
    } else {
        used = length = stated ? strtoul(stated, NULL, 10) : 0;
        if (have < length) return 0;
    }
    answer(c, body, length);
    if (c->phase == CLOSED) return 0;
    c->in.length -= head_length + used;
    memmove(c->in.bytes, c->in.bytes + head_length + used, c->in.length);
    return 1;
}

static void shrink_input(connection *c) {
    if (c->in.length || c->in.room <= KEPT_INPUT_BYTES) return;
    free(c->in.bytes);
    c->in = (text){0};
}

static void readable(connection *c) {
    for (;;) {
        reserve(&c->in, FIRST_INPUT_BYTES);
        size_t room = c->in.room - c->in.length;
        ssize_t n = recv(c->fd, c->in.bytes + c->in.length, room, 0);
        if (n < 0 && errno == EAGAIN) break;
        if (n <= 0 || c->in.length + (size_t)n > MAX_INPUT_BYTES) {
            close_connection(c);
            return;
        }
        c->in.length += (size_t)n;
        if ((size_t)n < room) break;
    }
    while (c->phase == READING && c->in.length && take_request(c)) {}
    if (c->phase != CLOSED) shrink_input(c);
}

static void writable(connection *c) {
    if (!flush(c)) return;
    if (c->phase == STREAMING && c->heap_place < 0) wait_until(c, c->asked.gap_ms ? c->due_us + (uint64_t)c->asked.gap_ms * 1000 : now_us());
}

static void accept_all(int listener) {
    int on = 1;
    for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0;) {
        connection *c = calloc(1, sizeof *c);
        if (!c) abort();
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        c->fd = fd;
        c->heap_place = -1;
        struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP, .data.ptr = c};
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &e);
        totals.connections++;
    }
}

static void serve_due(void) {
    uint64_t now = now_us(); /* one reading: a stream without gaps gets one burst per turn, like all the others */
    while (heap_count && heap[0]->due_us <= now && graves < EVENTS_PER_POLL * 2) {
        connection *c = heap[0];
        wait_no_more(c);
        if (c->phase == STARTING_JSON) answer_json(c);
        else stream_burst(c);
        while (c->phase == READING && c->in.length && take_request(c)) {}
    }
}

static int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    socklen_t size = sizeof at;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, BACKLOG) || getsockname(fd, (struct sockaddr *)&at, &size)) {
        perror("upstream");
        exit(1);
    }
    printf("%d\n", ntohs(at.sin_port));
    fflush(stdout);
    return fd;
}

static void serve(connection *c, uint32_t events) {
    if (c->phase == CLOSED) return;
    if (events & EPOLLOUT) writable(c);
    if (c->phase != CLOSED && (events & ~(uint32_t)EPOLLOUT)) readable(c);
}

int main(int argc, char **argv) {
    static struct epoll_event ready[EVENTS_PER_POLL];
    static int timer_tag;
    uint64_t ticks;
    signal(SIGPIPE, SIG_IGN);
    int listener = listen_on(argc > 1 ? atoi(argv[1]) : 0);
    poller = epoll_create1(0);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event on_accept = {.events = EPOLLIN}, on_timer = {.events = EPOLLIN, .data.ptr = &timer_tag};
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &on_accept);
    epoll_ctl(poller, EPOLL_CTL_ADD, timer, &on_timer);
    for (;;) {
        int n = epoll_wait(poller, ready, EVENTS_PER_POLL, -1);
        for (int i = 0; i < n; i++) {
            if (!ready[i].data.ptr) accept_all(listener);
            else if (ready[i].data.ptr == &timer_tag) (void)!read(timer, &ticks, sizeof ticks);
            else serve(ready[i].data.ptr, ready[i].events);
        }
        serve_due();
        bury();
        arm_timer();
    }
}
