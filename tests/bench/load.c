/* load: a closed-loop HTTP/1.1 load generator for one endpoint. One thread, epoll; one line of JSON on stdout.
 *
 *   load -p PORT -u PATH -b BODYFILE [-H 'Name: value']... -c CONNECTIONS (-n REQUESTS | -d SECONDS)
 *        [-s EVENTS] [-m MARK] [-r RAMP_MS] [-t DEADLINE_S]
 *
 * Each connection sends the same request over and over, the next one when the last byte of the answer is in; so the rate
 * is what the server makes of it, and a slow server is asked less (read latencies at one connection, rates at many).
 *
 * An answer counts only if it is right: status 200, whole (length or last chunk), MARK seen in it, and, with -s, exactly
 * EVENTS time stamps in it. A stamp is `@` + 16 digits + `@`: microseconds of CLOCK_MONOTONIC at which the upstream wrote
 * the event. Upstream and load run on one machine, hence on one clock, so `now - stamp` is the event's way through. The
 * stamps of a stream increase; one that does not belongs to a text said again at the end, and does not count.
 *
 * With -r each connection starts at a random moment of the ramp (drawn from a fixed seed: the same for every server).
 * At the deadline whatever is open is an error, and a stream that has not seen its first event enters the first-event
 * series with the time it has waited so far. So a stalled server looks better there than it is, but not good.
 *
 * Ugly: one series of doubles per figure, kept whole and sorted at the end; fine for the few million a run makes.
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
#include <time.h>
#include <unistd.h>

enum { HEAD_BYTES = 8192, READ_BYTES = 1 << 18, EVENTS_PER_POLL = 512, STAMP_DIGITS = 16, MAX_MARK = 32 };

typedef struct {
    double *values;
    size_t count, room;
} series;

static void series_add(series *s, double value) {
    if (s->count == s->room) {
        s->room = s->room ? s->room * 2 : 4096;
        s->values = realloc(s->values, s->room * sizeof *s->values);
        if (!s->values) abort();
    }
    s->values[s->count++] = value;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Nearest rank on a sorted series. */
static double quantile(const series *s, double q) {
    return s->count ? s->values[(size_t)(q * (double)(s->count - 1) + 0.5)] : 0;
}

typedef enum { IDLE, CONNECTING, SENDING, READING_HEAD, READING_BODY } phase_t;
typedef enum { BY_LENGTH, BY_CHUNKS, BY_CLOSE } framing_t;
typedef enum { CHUNK_SIZE, CHUNK_DATA, CHUNK_END, LAST_LINE } chunk_t;

typedef struct {
    int fd, status, closes;
    phase_t phase;
    framing_t framing;
    chunk_t chunk;
    size_t sent, head_length;
    uint64_t left;               /* bytes left of the body or of the chunk */
    uint64_t begun_us, first_us; /* first_us: first stamp seen, 0 for none */
    long events;
    int stamp_digits;            /* -1: no stamp begun */
    uint64_t stamp, last_stamp;
    size_t mark_seen;            /* length of the matching prefix; mark_length when it has been seen whole */
    char head[HEAD_BYTES];
} connection;

static struct {
    int port, connections;
    const char *path;
    char *request, mark[MAX_MARK];
    size_t request_length, mark_length;
    long requests, events_expected; /* events_expected < 0: not a stream */
    double seconds, ramp_ms, deadline_s;
} want = {.connections = 1, .path = "/v1/chat/completions", .events_expected = -1, .deadline_s = 60};

static struct {
    long begun, finished, open, errors, timeouts, events;
    int statuses[600];
    uint64_t last_us;
    series answer_ms, first_ms, transit_ms;
} seen;

static int poller;
static uint64_t start_us;

static uint64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

static int may_begin(uint64_t now) {
    if (want.requests) return seen.begun < want.requests;
    return (double)(now - start_us) < want.seconds * 1e6;
}

static void watch(connection *c, int operation, uint32_t events) {
    struct epoll_event e = {.events = events, .data.ptr = c};
    epoll_ctl(poller, operation, c->fd, &e);
}

static void hang_up(connection *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
}

static void finish(connection *c, int whole) {
    uint64_t now = now_us();
    int right = whole && c->status == 200 && c->mark_seen == want.mark_length;
    if (want.events_expected >= 0 && c->events != want.events_expected) right = 0;
    if (c->status > 0 && c->status < 600) seen.statuses[c->status]++;
    if (right) series_add(&seen.answer_ms, (double)(now - c->begun_us) / 1e3);
    else seen.errors++;
    seen.finished++;
    seen.open--;
    seen.last_us = now;
    c->phase = IDLE;
    if (!whole || c->closes) hang_up(c);
}

static void send_more(connection *c) {
    while (c->sent < want.request_length) {
        ssize_t n = send(c->fd, want.request + c->sent, want.request_length - c->sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) {
            if (c->phase != SENDING) watch(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
            c->phase = SENDING;
            return;
        }
        if (n < 0) {
            finish(c, 0);
            return;
        }
        c->sent += (size_t)n;
    }
    if (c->phase != READING_HEAD) watch(c, EPOLL_CTL_MOD, EPOLLIN);
    c->phase = READING_HEAD;
}

static void dial(connection *c) {
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)want.port)};
    int on = 1;
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0) {
        perror("socket");
        exit(1);
    }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    c->phase = CONNECTING;
    watch(c, EPOLL_CTL_ADD, EPOLLIN | EPOLLOUT);
    if (connect(c->fd, (struct sockaddr *)&to, sizeof to) < 0 && errno != EINPROGRESS) finish(c, 0);
}

static void begin(connection *c) {
    c->begun_us = now_us();
    c->first_us = c->sent = c->head_length = c->mark_seen = 0;
    c->events = 0;
    c->last_stamp = 0;
    c->status = c->closes = 0;
    c->stamp_digits = -1;
    seen.begun++;
    seen.open++;
    if (c->fd < 0) {
        dial(c);
    } else {
        c->phase = READING_HEAD; /* what send_more leaves behind when all goes out at once */
        send_more(c);
    }
}

static void count_event(connection *c, uint64_t now) {
    if (c->stamp <= c->last_stamp) return;
    c->last_stamp = c->stamp;
    if (!c->first_us) {
        c->first_us = now;
        series_add(&seen.first_ms, (double)(now - c->begun_us) / 1e3);
    }
    series_add(&seen.transit_ms, ((double)now - (double)c->stamp) / 1e3);
    c->events++;
    seen.events++;
}

static void look_for_stamps(connection *c, const char *p, const char *end, uint64_t now) {
    while (p < end) {
        if (c->stamp_digits < 0) {
            p = memchr(p, '@', (size_t)(end - p));
            if (!p) return;
            c->stamp = 0;
            c->stamp_digits = 0;
        } else if (*p >= '0' && *p <= '9') {
            c->stamp = c->stamp * 10 + (uint64_t)(*p - '0');
            c->stamp_digits++;
        } else if (*p == '@' && c->stamp_digits == STAMP_DIGITS) {
            count_event(c, now);
            c->stamp_digits = -1;
        } else {
            c->stamp_digits = -1;
        }
        p++;
    }
}

/* Marks are chosen so that none begins again inside itself: a mismatch restarts at the first letter. */
static void look_for_mark(connection *c, const char *p, const char *end) {
    while (p < end && c->mark_seen < want.mark_length) {
        if (c->mark_seen == 0) {
            p = memchr(p, want.mark[0], (size_t)(end - p));
            if (!p) return;
        }
        if (*p == want.mark[c->mark_seen]) c->mark_seen++;
        else c->mark_seen = *p == want.mark[0];
        p++;
    }
}

static void look(connection *c, const char *p, size_t n, uint64_t now) {
    if (want.events_expected >= 0) look_for_stamps(c, p, p + n, now);
    look_for_mark(c, p, p + n);
}

static int hexadecimal(char ch) {
    if (ch >= '0' && ch <= '9') return ch - '0';
    ch |= 32;
    return ch >= 'a' && ch <= 'f' ? ch - 'a' + 10 : -1;
}

/* True when the last chunk and the empty line after it are in. Trailers are not understood. */
static int read_chunks(connection *c, const char *p, size_t n, uint64_t now) {
    for (size_t i = 0; i < n;) {
        if (c->chunk == CHUNK_DATA) {
            size_t piece = n - i < c->left ? n - i : c->left;
            look(c, p + i, piece, now);
            c->left -= piece;
            i += piece;
            if (!c->left) c->chunk = CHUNK_END;
            continue;
        }
        char ch = p[i++];
        if (c->chunk == CHUNK_SIZE && hexadecimal(ch) >= 0) c->left = c->left * 16 + (uint64_t)hexadecimal(ch);
        if (ch != '\n') continue;
        if (c->chunk == LAST_LINE) return 1;
        if (c->chunk == CHUNK_SIZE) c->chunk = c->left ? CHUNK_DATA : LAST_LINE;
        else c->chunk = CHUNK_SIZE;
    }
    return 0;
}

static int read_body(connection *c, const char *p, size_t n, uint64_t now) {
    if (c->framing == BY_CHUNKS) return read_chunks(c, p, n, now);
    look(c, p, n, now);
    if (c->framing == BY_CLOSE) return 0;
    c->left -= n < c->left ? n : c->left;
    return c->left == 0;
}

static void read_header_line(connection *c, const char *line) {
    if (!strncasecmp(line, "content-length:", 15)) {
        c->framing = BY_LENGTH;
        c->left = strtoull(line + 15, NULL, 10);
    } else if (!strncasecmp(line, "transfer-encoding: chunked", 26)) {
        c->framing = BY_CHUNKS;
        c->chunk = CHUNK_SIZE;
        c->left = 0;
    } else if (!strncasecmp(line, "connection: close", 17)) {
        c->closes = 1;
    }
}

/* Bytes of `p` that belong to the head, or 0 while it is not whole. */
static size_t read_head(connection *c, const char *p, size_t n) {
    size_t had = c->head_length, take = n < HEAD_BYTES - 1 - had ? n : HEAD_BYTES - 1 - had;
    memcpy(c->head + had, p, take);
    c->head_length += take;
    c->head[c->head_length] = 0;
    char *end = strstr(c->head, "\r\n\r\n");
    if (!end) return 0;
    c->framing = BY_CLOSE;
    c->status = c->head_length > 12 ? atoi(c->head + 9) : 0;
    for (char *line = c->head; line < end; line = strstr(line, "\r\n") + 2) read_header_line(c, line);
    c->phase = READING_BODY;
    return (size_t)(end - c->head) + 4 - had;
}

static void next(connection *c, uint64_t now) {
    if (c->phase == IDLE && want.ramp_ms == 0 && may_begin(now)) begin(c);
}

static void readable(connection *c) {
    static char buffer[READ_BYTES];
    ssize_t got = recv(c->fd, buffer, sizeof buffer, 0);
    uint64_t now = now_us();
    if (got < 0 && errno == EAGAIN) return;
    if (c->phase == IDLE) {
        if (got <= 0) hang_up(c);
        return;
    }
    if (got <= 0) {
        c->closes = 1;
        finish(c, got == 0 && c->phase == READING_BODY && c->framing == BY_CLOSE);
        return;
    }
    const char *p = buffer;
    size_t n = (size_t)got;
    if (c->phase != READING_BODY) {
        size_t used = read_head(c, p, n);
        if (!used) {
            if (c->head_length >= HEAD_BYTES - 1) finish(c, 0);
            return;
        }
        p += used;
        n -= used;
    }
    if ((c->framing == BY_LENGTH && c->left == 0) || (n && read_body(c, p, n, now))) finish(c, 1);
}

static void writable(connection *c) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) finish(c, 0);
    else send_more(c);
}

static void serve(connection *c, uint32_t events) {
    if (c->fd < 0) return;
    if ((events & (EPOLLOUT | EPOLLERR)) && (c->phase == CONNECTING || c->phase == SENDING)) writable(c);
    if (c->fd >= 0 && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) && c->phase != CONNECTING) readable(c);
    next(c, now_us());
}

static double *draw_starts_ms(void) {
    double *starts_ms = calloc((size_t)want.connections, sizeof *starts_ms);
    uint64_t state = 0x9e3779b97f4a7c15u; /* the fixed seed */
    if (!starts_ms) abort();
    for (int i = 0; i < want.connections && want.ramp_ms > 0; i++) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        starts_ms[i] = want.ramp_ms * (double)(state >> 11) / 9007199254740992.0;
    }
    qsort(starts_ms, (size_t)want.connections, sizeof *starts_ms, ascending);
    return starts_ms;
}

static void run(connection *connections) {
    static struct epoll_event ready[EVENTS_PER_POLL];
    double *starts_ms = draw_starts_ms();
    int started = 0;
    start_us = seen.last_us = now_us();
    for (;;) {
        uint64_t now = now_us();
        double age_ms = (double)(now - start_us) / 1e3;
        while (started < want.connections && starts_ms[started] <= age_ms && may_begin(now)) begin(&connections[started++]);
        if (age_ms > want.deadline_s * 1e3) break;
        if (!seen.open && (started == want.connections || !may_begin(now))) {
            for (int i = 0; i < started; i++) next(&connections[i], now); /* those whose last try failed at once */
            if (!seen.open) break;
        }
        int n = epoll_wait(poller, ready, EVENTS_PER_POLL, started < want.connections ? 1 : 50);
        for (int i = 0; i < n; i++) serve(ready[i].data.ptr, ready[i].events);
    }
    free(starts_ms);
}

static void give_up_open(connection *connections) {
    uint64_t now = now_us();
    for (int i = 0; i < want.connections; i++) {
        connection *c = &connections[i];
        if (c->phase == IDLE) continue;
        if (want.events_expected >= 0 && !c->first_us) series_add(&seen.first_ms, (double)(now - c->begun_us) / 1e3);
        seen.timeouts++;
        seen.errors++;
        seen.last_us = now;
    }
}

static void print_series(const char *name, series *s) {
    qsort(s->values, s->count, sizeof *s->values, ascending);
    printf(",\"%s_p50_ms\":%.4f,\"%s_p99_ms\":%.4f", name, quantile(s, 0.5), name, quantile(s, 0.99));
}

static void print_result(void) {
    const char *comma = "";
    printf("{\"wall_s\":%.4f,\"ok\":%zu,\"errors\":%ld,\"timeouts\":%ld,\"events\":%ld",
           (double)(seen.last_us - start_us) / 1e6, seen.answer_ms.count, seen.errors, seen.timeouts, seen.events);
    print_series("answer", &seen.answer_ms);
    print_series("first", &seen.first_ms);
    print_series("transit", &seen.transit_ms);
    printf(",\"statuses\":{");
    for (int i = 0; i < 600; i++) {
        if (!seen.statuses[i]) continue;
        printf("%s\"%d\":%d", comma, i, seen.statuses[i]);
        comma = ",";
    }
    printf("}}\n");
}

static char *read_file(const char *name, size_t *length) {
    FILE *file = fopen(name, "rb");
    if (!file || fseek(file, 0, SEEK_END)) {
        perror(name);
        exit(2);
    }
    *length = (size_t)ftell(file);
    rewind(file);
    char *bytes = malloc(*length + 1);
    if (!bytes || fread(bytes, 1, *length, file) != *length) {
        perror(name);
        exit(2);
    }
    fclose(file);
    return bytes;
}

static void build_request(const char *body_file, const char *headers) {
    size_t body_length, room;
    char *body = read_file(body_file, &body_length);
    room = body_length + strlen(headers) + strlen(want.path) + 512;
    want.request = malloc(room);
    if (!want.request) abort();
    int head = snprintf(want.request, room,
                        "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\nAccept: */*\r\n"
                        "User-Agent: bench-load\r\nContent-Length: %zu\r\n%s\r\n",
                        want.path, want.port, body_length, headers);
    memcpy(want.request + head, body, body_length);
    want.request_length = (size_t)head + body_length;
    free(body);
}

static void read_options(int argc, char **argv) {
    char headers[4096] = "";
    const char *body_file = NULL;
    size_t used = 0;
    for (int option; (option = getopt(argc, argv, "p:u:b:H:c:n:d:s:m:r:t:")) > 0;) switch (option) {
        case 'p': want.port = atoi(optarg); break;
        case 'u': want.path = optarg; break;
        case 'b': body_file = optarg; break;
        case 'H': used += (size_t)snprintf(headers + used, sizeof headers - used, "%s\r\n", optarg); break;
        case 'c': want.connections = atoi(optarg); break;
        case 'n': want.requests = atol(optarg); break;
        case 'd': want.seconds = atof(optarg); break;
        case 's': want.events_expected = atol(optarg); break;
        case 'm': snprintf(want.mark, sizeof want.mark, "%s", optarg); break;
        case 'r': want.ramp_ms = atof(optarg); break;
        case 't': want.deadline_s = atof(optarg); break;
        default: exit(2);
    }
    if (!want.port || !body_file || used >= sizeof headers || !(want.requests || want.seconds > 0)) {
        fprintf(stderr, "load: -p PORT, -b BODYFILE and one of -n and -d are needed\n");
        exit(2);
    }
    want.mark_length = strlen(want.mark);
    build_request(body_file, headers);
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    read_options(argc, argv);
    poller = epoll_create1(0);
    connection *connections = calloc((size_t)want.connections, sizeof *connections);
    if (!connections) abort();
    for (int i = 0; i < want.connections; i++) connections[i].fd = -1;
    run(connections);
    give_up_open(connections);
    print_result();
    return 0;
}
