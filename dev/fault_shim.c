/* Calls on chosen files that fail as a bad or full disk makes them fail; put before libc by LD_PRELOAD.
 *
 * FAULT_OPS    operations, with commas: open read write fsync close rename unlink mkdir truncate,
 *              and create, which is to open what may have to be made
 * FAULT_PATH   the path has this in it (of a rename: either name)
 * FAULT_ERRNO  what the call answers; 0: a write, or a read, does only half of what was asked
 * FAULT_FIRST  the first call that fails, from 1; FAULT_TIMES how many do, 0 for all from then on
 * FAULT_WHEN   a file: calls count only while it is there (empty: always)
 * FAULT_LOG    a file that gets a line for every call that failed
 *
 * Each process counts its own calls.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls;
static __thread int busy;

static const char *setting(const char *name) {
    const char *value = getenv(name);
    return value ? value : "";
}

static int is_asked(const char *op) {
    const char *list = setting("FAULT_OPS");
    size_t length = strlen(op);
    while (*list) {
        size_t word = strcspn(list, ",");
        if (word == length && !strncmp(list, op, length)) return 1;
        list += word + (list[word] == ',');
    }
    return 0;
}

static void note(const char *op, const char *path) {
    const char *log = setting("FAULT_LOG");
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s %s\n", op, path);
    int fd = *log ? (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666) : -1;
    if (fd >= 0) {
        (void)!syscall(SYS_write, fd, line, (size_t)length);
        syscall(SYS_close, fd);
    }
}

/* Whether this call fails. The settings are read at every call: Python may change them in mid-run. */
static int fails(const char *op, const char *path) {
    const char *part = setting("FAULT_PATH"), *when = setting("FAULT_WHEN");
    if (busy || !*part || !is_asked(op) || !strstr(path, part)) return 0;
    busy = 1;
    int counts = !*when || syscall(SYS_faccessat, AT_FDCWD, when, F_OK) == 0;
    busy = 0;
    if (!counts) return 0;
    long first = atol(setting("FAULT_FIRST")), times = atol(setting("FAULT_TIMES"));
    long number = atomic_fetch_add(&calls, 1) + 1;
    if (number < (first ? first : 1)) return 0;
    if (times && number >= (first ? first : 1) + times) return 0;
    note(op, path);
    errno = atoi(setting("FAULT_ERRNO"));
    return 1;
}

static const char *path_of(int fd, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, buffer, (size_t)PATH_MAX - 1);
    buffer[length < 0 ? 0 : length] = 0;
    return buffer;
}

static const char *path_at(int dir, const char *path, char *buffer) {
    if (path[0] == '/' || dir == AT_FDCWD) return path;
    path_of(dir, buffer);
    size_t length = strlen(buffer);
    snprintf(buffer + length, (size_t)PATH_MAX - length, "/%s", path);
    return buffer;
}

static int fd_fails(const char *op, int fd) {
    char buffer[PATH_MAX];
    int before = errno;
    if (!is_asked(op)) return 0;
    path_of(fd, buffer);
    errno = before;
    return fails(op, buffer);
}

static int at_fails(const char *op, int dir, const char *path) {
    char buffer[PATH_MAX];
    return is_asked(op) && fails(op, path_at(dir, path, buffer));
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                  \
    int name(const char *path, int flags, ...) {                    \
        mode_t mode = 0;                                            \
        if (flags & (O_CREAT | __O_TMPFILE)) {                      \
            va_list rest;                                           \
            va_start(rest, flags);                                  \
            mode = va_arg(rest, mode_t);                            \
            va_end(rest);                                           \
        }                                                           \
        if (at_fails("open", AT_FDCWD, path)) return -1;            \
        if (flags & O_CREAT && at_fails("create", AT_FDCWD, path))  \
            return -1;                                              \
        return REAL(name)(path, flags, mode);                       \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                \
    int name(int dir, const char *path, int flags, ...) {           \
        mode_t mode = 0;                                            \
        if (flags & (O_CREAT | __O_TMPFILE)) {                      \
            va_list rest;                                           \
            va_start(rest, flags);                                  \
            mode = va_arg(rest, mode_t);                            \
            va_end(rest);                                           \
        }                                                           \
        if (at_fails("open", dir, path)) return -1;                 \
        if (flags & O_CREAT && at_fails("create", dir, path))       \
            return -1;                                              \
        return REAL(name)(dir, path, flags, mode);                  \
    }
OPENAT(openat)
OPENAT(openat64)

/* The number of bytes to go on with, or 0 where the call fails. */
static size_t allowed(const char *op, int fd, size_t count) {
    if (count == 0 || !fd_fails(op, fd)) return count;
    if (errno) return 0;
    return count > 1 ? count / 2 : count;
}

#define MOVE(name, op, result, parameters, arguments)               \
    result name parameters {                                        \
        if (count && !(count = allowed(op, fd, count))) return -1;  \
        return REAL(name) arguments;                                \
    }
MOVE(read, "read", ssize_t, (int fd, void *data, size_t count), (fd, data, count))
MOVE(pread, "read", ssize_t, (int fd, void *data, size_t count, off_t at), (fd, data, count, at))
MOVE(pread64, "read", ssize_t, (int fd, void *data, size_t count, off64_t at), (fd, data, count, at))
MOVE(write, "write", ssize_t, (int fd, const void *data, size_t count), (fd, data, count))
MOVE(pwrite, "write", ssize_t, (int fd, const void *data, size_t count, off_t at), (fd, data, count, at))
MOVE(pwrite64, "write", ssize_t, (int fd, const void *data, size_t count, off64_t at), (fd, data, count, at))

ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (fd_fails("write", fd)) {
        if (errno) return -1;
        if (count > 1) return REAL(writev)(fd, parts, count / 2);
    }
    return REAL(writev)(fd, parts, count);
}

#define ON_FD(name, op)                                             \
    int name(int fd) {                                              \
        return fd_fails(op, fd) ? -1 : REAL(name)(fd);              \
    }
ON_FD(fsync, "fsync")
ON_FD(fdatasync, "fsync")

int close(int fd) {
    int failed = fd_fails("close", fd), why = errno;
    int result = REAL(close)(fd); /* as Linux does: the descriptor is gone whatever the answer */
    if (failed) errno = why;
    return failed ? -1 : result;
}

int ftruncate(int fd, off_t length) { return fd_fails("truncate", fd) ? -1 : REAL(ftruncate)(fd, length); }
int ftruncate64(int fd, off64_t length) { return fd_fails("truncate", fd) ? -1 : REAL(ftruncate64)(fd, length); }
int posix_fallocate(int fd, off_t at, off_t length) {
    return fd_fails("truncate", fd) ? errno : REAL(posix_fallocate)(fd, at, length);
}

static int rename_fails(int from_dir, const char *from, int to_dir, const char *to) {
    char one[PATH_MAX], two[PATH_MAX], both[2 * PATH_MAX + 8];
    if (!is_asked("rename")) return 0;
    snprintf(both, sizeof both, "%s -> %s", path_at(from_dir, from, one), path_at(to_dir, to, two));
    return fails("rename", both);
}

int rename(const char *from, const char *to) {
    return rename_fails(AT_FDCWD, from, AT_FDCWD, to) ? -1 : REAL(rename)(from, to);
}
int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    return rename_fails(from_dir, from, to_dir, to) ? -1 : REAL(renameat)(from_dir, from, to_dir, to);
}
int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned int flags) {
    return rename_fails(from_dir, from, to_dir, to) ? -1 : REAL(renameat2)(from_dir, from, to_dir, to, flags);
}

int unlink(const char *path) { return at_fails("unlink", AT_FDCWD, path) ? -1 : REAL(unlink)(path); }
int rmdir(const char *path) { return at_fails("unlink", AT_FDCWD, path) ? -1 : REAL(rmdir)(path); }
int unlinkat(int dir, const char *path, int flags) {
    return at_fails("unlink", dir, path) ? -1 : REAL(unlinkat)(dir, path, flags);
}
int mkdir(const char *path, mode_t mode) { return at_fails("mkdir", AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode); }
int mkdirat(int dir, const char *path, mode_t mode) {
    return at_fails("mkdir", dir, path) ? -1 : REAL(mkdirat)(dir, path, mode);
}
