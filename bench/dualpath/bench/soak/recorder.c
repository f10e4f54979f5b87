/* Records what a process does to the files below one directory, for power_loss.py to replay.
 *
 * Preloaded (LD_PRELOAD). Wraps the calls of libc that change files, names or durability. Each is
 * carried out and appended to a log under one lock, so the order of the log is that of the effects.
 * Reads and files elsewhere are left alone. Calls that the replay could not follow (links, writes
 * through other descriptors of the same file) are logged as UNKNOWN, which makes the replay fail
 * loudly instead of guessing. Before change number DUALPATH_RECORD_CUT the process kills itself.
 *
 * DUALPATH_RECORD_ROOT  the directory, absolute
 * DUALPATH_RECORD_LOG   the log, outside of it
 *
 * A record: u32 kind, i32 handle, i64 a, i64 b, u32 bytes, then the bytes. Little endian.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind {
    OPENED = 1, /* a: flags, b: 1 if it was made; bytes: path */
    WRITTEN,    /* a: offset, b: 1 if durable at once; bytes: data */
    SIZED,      /* a: size */
    SYNCED,
    RENAMED, /* bytes: old path, NUL, new path */
    UNLINKED,
    MADE_DIRECTORY,
    REMOVED_DIRECTORY,
    NOTE,
    UNKNOWN, /* bytes: what */
    SYNC_FAILED, /* a sync has failed on purpose: what was not synced may be lost for good */
};

struct record {
    uint32_t kind;
    int32_t handle;
    int64_t a, b;
    uint32_t bytes;
} __attribute__((packed));

#define FDS_MAX 65536
static int handles[FDS_MAX]; /* 0: not below the root */
static char durable_at_once[FDS_MAX];
static char may_fail[FDS_MAX], may_end[FDS_MAX];
static int next_handle; /* unique among the processes that share a log */
static int log_fd = -1;
static char root[PATH_MAX];
static size_t root_bytes;
static long changes, cut;
static char synced[256]; /* before so many syncs of files whose path holds this, it kills itself */
static long syncs_left;
static char failing[256]; /* files whose path holds this fail now and then; "": none */
static uint32_t failing_writes, failing_syncs; /* of a million */
static uint64_t fate;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(result, name, ...)                                                                    \
    static result (*real_##name)(__VA_ARGS__);                                                     \
    if (!real_##name) real_##name = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

static ssize_t log_writev(const struct iovec *parts, int count) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    return real_writev(log_fd, parts, count);
}

static void die(const char *why) {
    fprintf(stderr, "recorder: %s: %s\n", why, strerror(errno));
    abort();
}

static void append(enum kind kind, int handle, int64_t a, int64_t b, const struct iovec *data,
                   int count, size_t bytes) {
    struct record head = {kind, handle, a, b, (uint32_t)bytes};
    struct iovec parts[17];
    parts[0].iov_base = &head;
    parts[0].iov_len = sizeof head;
    size_t left = bytes;
    int at = 0;
    do {
        int used = at == 0 ? 1 : 0;
        size_t wanted = at == 0 ? sizeof head : 0;
        while (at < count && used < 17 && left) {
            size_t part = data[at].iov_len < left ? data[at].iov_len : left;
            parts[used].iov_base = data[at].iov_base;
            parts[used].iov_len = part;
            used++, at++, left -= part, wanted += part;
        }
        if (log_writev(parts, used) != (ssize_t)wanted) die("the log cannot be written");
    } while (at < count && left);
}

static void append_text(enum kind kind, int handle, int64_t a, int64_t b, const char *text,
                        size_t bytes) {
    struct iovec part = {(void *)text, bytes};
    append(kind, handle, a, b, &part, 1, bytes);
}

__attribute__((constructor)) static void start(void) {
    const char *where = getenv("DUALPATH_RECORD_ROOT"), *log = getenv("DUALPATH_RECORD_LOG");
    const char *when = getenv("DUALPATH_RECORD_CUT");
    if (!where || !log || !realpath(where, root)) return;
    root_bytes = strlen(root);
    cut = when ? atol(when) : 0;
    REAL(int, open64, const char *, int, ...);
    log_fd = real_open64(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (log_fd < 0) die(log);
    next_handle = (getpid() & 0x7fff) << 16;
}

/* Whether this call is to fail, with the lock held. */
static int fails(int fd, uint32_t of_a_million) {
    if (!may_fail[fd] || !of_a_million) return 0;
    fate ^= fate << 13, fate ^= fate >> 7, fate ^= fate << 17;
    return fate % 1000000 < of_a_million;
}

/* Begin and end of a change: the lock is held in between. */
static void begin(void) {
    pthread_mutex_lock(&lock);
    if (cut > 0 && ++changes >= cut) kill(getpid(), SIGKILL);
}

static void begin_sync(int fd) {
    begin();
    if (may_end[fd] && --syncs_left <= 0) kill(getpid(), SIGKILL);
}

static void end(void) { pthread_mutex_unlock(&lock); }

/* Absolute path of (directory, path) if it lies below the root, else 0. */
static int below(int directory, const char *path, char *out) {
    if (log_fd < 0 || !path) return 0;
    if (path[0] == '/') {
        if (snprintf(out, PATH_MAX, "%s", path) >= PATH_MAX) return 0;
    } else {
        char base[PATH_MAX];
        if (directory == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return 0;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
            ssize_t n = readlink(link, base, sizeof base - 1);
            if (n < 0) return 0;
            base[n] = 0;
        }
        if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return 0;
    }
    return !strncmp(out, root, root_bytes) && (out[root_bytes] == '/' || !out[root_bytes]);
}

static int handle_of(int fd) {
    return log_fd >= 0 && fd >= 0 && fd < FDS_MAX ? handles[fd] : 0;
}

static int opened(int fd, int flags, const char *path, int made) {
    if (fd < 0) return fd;
    if (fd >= FDS_MAX) die("a descriptor is too high");
    handles[fd] = ++next_handle;
    durable_at_once[fd] = (flags & (O_SYNC | O_DSYNC)) != 0;
    may_fail[fd] = *failing && strstr(path, failing) != NULL;
    may_end[fd] = *synced && strstr(path, synced) != NULL;
    append_text(OPENED, handles[fd], flags, made, path, strlen(path));
    return fd;
}

typedef int (*open_function)(int, const char *, int, mode_t);

static int call_openat(int directory, const char *path, int flags, mode_t mode) {
    REAL(int, openat64, int, const char *, int, ...);
    return real_openat64(directory, path, flags, mode);
}

static int open_any(int directory, const char *path, int flags, mode_t mode) {
    char whole[PATH_MAX];
    if (!below(directory, path, whole)) return call_openat(directory, path, flags, mode);
    int changing = flags & (O_CREAT | O_TRUNC);
    if (changing) begin();
    else pthread_mutex_lock(&lock);
    struct stat before;
    int made = (flags & O_CREAT) && lstat(whole, &before) != 0;
    int fd = opened(call_openat(directory, path, flags, mode), flags, whole, made);
    int error = errno;
    end();
    errno = error;
    return fd;
}

#define MODE(flags)                                                                                \
    mode_t mode = 0;                                                                               \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {                                                       \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode = (mode_t)va_arg(rest, int);                                                          \
        va_end(rest);                                                                              \
    }

int open(const char *path, int flags, ...) { MODE(flags) return open_any(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return open_any(AT_FDCWD, path, flags, mode); }
int openat(int d, const char *path, int flags, ...) { MODE(flags) return open_any(d, path, flags, mode); }
int openat64(int d, const char *path, int flags, ...) { MODE(flags) return open_any(d, path, flags, mode); }
int creat(const char *path, mode_t mode) { return open_any(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

int close(int fd) {
    REAL(int, close, int);
    if (handle_of(fd)) {
        pthread_mutex_lock(&lock);
        handles[fd] = 0;
        end();
    }
    return real_close(fd);
}

/* Another descriptor of the same open file. */
static int doubled(int old, int fd) {
    if (fd >= 0 && fd != old && handle_of(old)) {
        if (fd >= FDS_MAX) die("a descriptor is too high");
        pthread_mutex_lock(&lock);
        handles[fd] = handles[old];
        durable_at_once[fd] = durable_at_once[old];
        may_fail[fd] = may_fail[old];
        may_end[fd] = may_end[old];
        end();
    }
    return fd;
}
int dup(int fd) {
    REAL(int, dup, int);
    return doubled(fd, real_dup(fd));
}
int dup2(int fd, int to) {
    REAL(int, dup2, int, int);
    return doubled(fd, real_dup2(fd, to));
}
int dup3(int fd, int to, int flags) {
    REAL(int, dup3, int, int, int);
    return doubled(fd, real_dup3(fd, to, flags));
}
int fcntl64(int fd, int command, ...) {
    REAL(int, fcntl64, int, int, ...);
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    int result = real_fcntl64(fd, command, argument);
    return command == F_DUPFD || command == F_DUPFD_CLOEXEC ? doubled(fd, result) : result;
}
int fcntl(int fd, int command, ...) {
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    return fcntl64(fd, command, argument);
}

static ssize_t wrote(int fd, ssize_t moved, off_t offset, const struct iovec *parts, int count) {
    if (moved > 0)
        append(WRITTEN, handles[fd], offset, durable_at_once[fd], parts, count, (size_t)moved);
    return moved;
}

/* A write that fails: nothing of it is done, or half of its first part. */
static ssize_t failed_write(int fd, const struct iovec *parts, off_t offset) {
    REAL(ssize_t, pwritev64, int, const struct iovec *, int, off_t);
    struct iovec half = {parts[0].iov_base, parts[0].iov_len / 2 / 4096 * 4096};
    if (fate & 1 && half.iov_len && offset >= 0)
        wrote(fd, real_pwritev64(fd, &half, 1, offset), offset, &half, 1);
    end();
    errno = EIO;
    return -1;
}

/* offset -1: at the file's own position */
static ssize_t write_any(int fd, const struct iovec *parts, int count, off_t offset) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    REAL(ssize_t, pwritev64, int, const struct iovec *, int, off_t);
    if (!handle_of(fd))
        return offset < 0 ? real_writev(fd, parts, count) : real_pwritev64(fd, parts, count, offset);
    begin();
    if (fails(fd, failing_writes)) return failed_write(fd, parts, offset);
    off_t at = offset < 0 ? lseek(fd, 0, SEEK_CUR) : offset;
    ssize_t moved = offset < 0 ? real_writev(fd, parts, count) : real_pwritev64(fd, parts, count, offset);
    int error = errno;
    wrote(fd, moved, at, parts, count);
    end();
    errno = error;
    return moved;
}

ssize_t write(int fd, const void *data, size_t bytes) {
    REAL(ssize_t, write, int, const void *, size_t);
    if (!handle_of(fd)) return real_write(fd, data, bytes);
    struct iovec part = {(void *)data, bytes};
    return write_any(fd, &part, 1, -1);
}
ssize_t pwrite64(int fd, const void *data, size_t bytes, off64_t offset) {
    struct iovec part = {(void *)data, bytes};
    return write_any(fd, &part, 1, offset);
}
ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset) { return pwrite64(fd, data, bytes, offset); }
ssize_t writev(int fd, const struct iovec *parts, int count) { return write_any(fd, parts, count, -1); }
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) { return write_any(fd, parts, count, offset); }
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) { return write_any(fd, parts, count, offset); }
ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
    REAL(ssize_t, pwritev2, int, const struct iovec *, int, off_t, int);
    if (!handle_of(fd) || flags) {
        if (handle_of(fd)) append_text(UNKNOWN, 0, 0, 0, "pwritev2", 8);
        return real_pwritev2(fd, parts, count, offset, flags);
    }
    return write_any(fd, parts, count, offset);
}
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) { return pwritev2(fd, parts, count, offset, flags); }

/* A change of one descriptor that has a size as its outcome. */
#define SIZE_CHANGE(name, call)                                                                    \
    if (!handle_of(fd)) return call;                                                               \
    begin();                                                                                       \
    int result = call;                                                                             \
    int error = errno;                                                                             \
    struct stat after;                                                                             \
    if (!fstat(fd, &after)) append(SIZED, handles[fd], after.st_size, 0, NULL, 0, 0);              \
    end();                                                                                         \
    errno = error;                                                                                 \
    return result;

int ftruncate64(int fd, off64_t size) {
    REAL(int, ftruncate64, int, off64_t);
    SIZE_CHANGE(ftruncate64, real_ftruncate64(fd, size))
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }
int posix_fallocate64(int fd, off64_t offset, off64_t bytes) {
    REAL(int, posix_fallocate64, int, off64_t, off64_t);
    SIZE_CHANGE(posix_fallocate64, real_posix_fallocate64(fd, offset, bytes))
}
int posix_fallocate(int fd, off_t offset, off_t bytes) { return posix_fallocate64(fd, offset, bytes); }
int fallocate64(int fd, int mode, off64_t offset, off64_t bytes) {
    REAL(int, fallocate64, int, int, off64_t, off64_t);
    if (handle_of(fd) && (mode & ~1)) append_text(UNKNOWN, 0, 0, 0, "fallocate", 9);
    SIZE_CHANGE(fallocate64, real_fallocate64(fd, mode, offset, bytes))
}
int fallocate(int fd, int mode, off_t offset, off_t bytes) { return fallocate64(fd, mode, offset, bytes); }

/* Logged once it has returned: until then nothing is promised. */
#define SYNC(name)                                                                                 \
    int name(int fd) {                                                                             \
        REAL(int, name, int);                                                                      \
        if (!handle_of(fd)) return real_##name(fd);                                                \
        begin_sync(fd);                                                                            \
        int refused = fails(fd, failing_syncs);                                                    \
        int result = refused ? -1 : real_##name(fd);                                               \
        int error = refused ? EIO : errno;                                                         \
        if (!result) append(SYNCED, handles[fd], 0, 0, NULL, 0, 0);                                \
        if (refused) append(SYNC_FAILED, handles[fd], 0, 0, NULL, 0, 0);                           \
        end();                                                                                     \
        errno = error;                                                                             \
        return result;                                                                             \
    }
SYNC(fsync)
SYNC(fdatasync)

static int rename_any(int d, const char *from, int e, const char *to, unsigned flags) {
    REAL(int, renameat2, int, const char *, int, const char *, unsigned);
    char paths[2 * PATH_MAX], target[PATH_MAX];
    int first = below(d, from, paths), second = below(e, to, target);
    if (!first && !second) return real_renameat2(d, from, e, to, flags);
    begin();
    int result = real_renameat2(d, from, e, to, flags);
    int error = errno;
    if (!result && (flags || !first || !second)) append_text(UNKNOWN, 0, 0, 0, "rename", 6);
    size_t bytes = strlen(paths);
    memcpy(paths + bytes + 1, target, strlen(target) + 1);
    if (!result) append_text(RENAMED, 0, 0, 0, paths, bytes + 1 + strlen(target));
    end();
    errno = error;
    return result;
}
int rename(const char *from, const char *to) { return rename_any(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int d, const char *from, int e, const char *to) { return rename_any(d, from, e, to, 0); }
int renameat2(int d, const char *from, int e, const char *to, unsigned flags) { return rename_any(d, from, e, to, flags); }

/* A change of one name. */
#define NAME_CHANGE(kind, d, path, call)                                                           \
    char whole[PATH_MAX];                                                                          \
    if (!below(d, path, whole)) return call;                                                       \
    begin();                                                                                       \
    int result = call;                                                                             \
    int error = errno;                                                                             \
    if (!result) append_text(kind, 0, 0, 0, whole, strlen(whole));                                 \
    end();                                                                                         \
    errno = error;                                                                                 \
    return result;

int unlinkat(int d, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    NAME_CHANGE(flags & AT_REMOVEDIR ? REMOVED_DIRECTORY : UNLINKED, d, path, real_unlinkat(d, path, flags))
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int mkdirat(int d, const char *path, mode_t mode) {
    REAL(int, mkdirat, int, const char *, mode_t);
    NAME_CHANGE(MADE_DIRECTORY, d, path, real_mkdirat(d, path, mode))
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int linkat(int d, const char *from, int e, const char *to, int flags) {
    REAL(int, linkat, int, const char *, int, const char *, int);
    char whole[PATH_MAX];
    if (below(e, to, whole)) append_text(UNKNOWN, 0, 0, 0, "link", 4);
    return real_linkat(d, from, e, to, flags);
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }
int symlinkat(const char *target, int d, const char *path) {
    REAL(int, symlinkat, const char *, int, const char *);
    char whole[PATH_MAX];
    if (below(d, path, whole)) append_text(UNKNOWN, 0, 0, 0, "symlink", 7);
    return real_symlinkat(target, d, path);
}
int symlink(const char *target, const char *path) { return symlinkat(target, AT_FDCWD, path); }

/* For the recorded program, by ctypes. */

/* Put a note into the log, in order with everything else. */
__attribute__((visibility("default"))) void dualpath_record_note(const void *data, size_t bytes) {
    if (log_fd < 0) return;
    pthread_mutex_lock(&lock);
    append_text(NOTE, 0, 0, 0, data, bytes);
    end();
}

/* Begin to record below another root into another log; for processes that are forked. */
__attribute__((visibility("default"))) int dualpath_record_begin(const char *where, const char *log,
                                                                 long cut_at) {
    if (!realpath(where, root)) return -1;
    root_bytes = strlen(root);
    cut = cut_at;
    changes = 0;
    int fd = call_openat(AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd < 0) return -1;
    log_fd = fd;
    next_handle = (getpid() & 0x7fff) << 16;
    /* Its own children are recorded too; the cut is for this process alone. */
    return setenv("DUALPATH_RECORD_ROOT", where, 1) || setenv("DUALPATH_RECORD_LOG", log, 1);
}

/* From now on files that are opened, and whose path holds `where`, fail now and then. */
__attribute__((visibility("default"))) int dualpath_record_fail(const char *where, uint32_t writes,
                                                                uint32_t syncs, uint64_t seed) {
    if (strlen(where) >= sizeof failing) return -1;
    pthread_mutex_lock(&lock);
    strcpy(failing, where);
    failing_writes = writes, failing_syncs = syncs;
    fate = seed | 1;
    end();
    return 0;
}

/* Of files that are opened from now on, and whose path holds `where`, sync number `count` kills. */
__attribute__((visibility("default"))) int dualpath_record_end(const char *where, long count) {
    if (strlen(where) >= sizeof synced) return -1;
    pthread_mutex_lock(&lock);
    strcpy(synced, where);
    syncs_left = count;
    end();
    return 0;
}

/* A write or a sync that went past libc (io_uring), told by the program: once for all, after it is
 * done. The kill comes before. */
__attribute__((visibility("default"))) void dualpath_record_cut(void) {
    if (log_fd < 0) return;
    begin();
    end();
}
__attribute__((visibility("default"))) void dualpath_record_write(int fd, const void *data,
                                                                  size_t bytes, long offset) {
    if (!handle_of(fd)) return;
    pthread_mutex_lock(&lock);
    append_text(WRITTEN, handles[fd], offset, 0, data, bytes);
    end();
}
