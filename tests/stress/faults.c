/* Makes the n-th call of one kind fail for files under given folders, and lists the files used.

   cc -shared -fPIC -O1 -o faults.so faults.c -ldl;  LD_PRELOAD=./faults.so python ...

   Nothing fails until fault_arm is called, and only in the process that calls it and its forks.
   Counts and the list are shared by all forks. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, READ, WRITE, FSYNC, RENAME, MKDIR, KINDS };
#define LIST_BYTES (1 << 22)

static struct {
    long counts[KINDS]; /* calls so far */
    long fired;         /* calls that failed */
    char path[PATH_MAX]; /* of the first that failed */
    long used;
    char list[LIST_BYTES]; /* a letter and a path for each call on a path, one a line */
} *shared;
static char folders[2][PATH_MAX]; /* empty: not armed */
static int kind = -1, error_number, sticky;
static long nth;

__attribute__((constructor)) static void start(void) {
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void fault_reset(void) { memset(shared, 0, sizeof *shared); }
long fault_count(int k) { return shared->counts[k]; }
long fault_fired(void) { return shared->fired; }
const char *fault_path(void) { return shared->path; }
const char *fault_list(void) { return shared->list; }

/* From now on, fail the n-th call of a kind (and with `lasting` all later ones); 0: count only. */
void fault_arm(const char *first, const char *second, int k, long n, int error, int lasting) {
    snprintf(folders[0], PATH_MAX, "%s", first);
    snprintf(folders[1], PATH_MAX, "%s", second);
    kind = k, nth = n, error_number = error, sticky = lasting;
}

static int inside(const char *path) {
    for (int i = 0; i < 2; i++) {
        size_t size = strlen(folders[i]);
        if (size && !strncmp(path, folders[i], size) && (!path[size] || path[size] == '/'))
            return 1;
    }
    return 0;
}

/* Whether this call fails. It counts if the path is in one of the folders. */
static int fails(int k, const char *path, int listed) {
    if (!folders[0][0] || !inside(path)) return 0;
    long number = __sync_add_and_fetch(&shared->counts[k], 1);
    if (listed) {
        long size = strlen(path) + 2, at = __sync_fetch_and_add(&shared->used, size);
        if (at + size < LIST_BYTES) {
            shared->list[at] = "orwfnm"[k];
            memcpy(shared->list + at + 1, path, size - 2);
            shared->list[at + size - 1] = '\n';
        }
    }
    if (k != kind || !nth || (sticky ? number < nth : number != nth)) return 0;
    if (__sync_fetch_and_add(&shared->fired, 1) == 0) snprintf(shared->path, PATH_MAX, "%s", path);
    errno = error_number;
    return 1;
}

static int fails_at(int k, int folder, const char *path) {
    char text[PATH_MAX], link[64];
    if (!folders[0][0] || !path) return 0;
    if (path[0] == '/') return fails(k, path, 1);
    ssize_t size = -1;
    if (folder == AT_FDCWD) {
        size = readlink("/proc/self/cwd", text, PATH_MAX - 1);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        size = readlink(link, text, PATH_MAX - 1);
    }
    if (size < 0) return 0;
    snprintf(text + size, PATH_MAX - size, "/%s", path);
    return fails(k, text, 1);
}

static int fails_fd(int k, int fd) {
    char text[PATH_MAX], link[64];
    if (!folders[0][0]) return 0;
    int kept = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, text, PATH_MAX - 1);
    errno = kept;
    if (size < 0) return 0;
    text[size] = 0;
    return fails(k, text, 0);
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define MODE(flags) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { \
        va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); \
    }
#define OPENER(name) \
    int name(const char *path, int flags, ...) { \
        MODE(flags) REAL(name); \
        return fails_at(OPEN, AT_FDCWD, path) ? -1 : real(path, flags, mode); \
    }
#define OPENER_AT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        MODE(flags) REAL(name); \
        return fails_at(OPEN, folder, path) ? -1 : real(folder, path, flags, mode); \
    }
#define STREAM(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(name); \
        return fails_at(OPEN, AT_FDCWD, path) ? NULL : real(path, mode); \
    }
#define ON_FD(type, name, k, parameters, ...) \
    type name parameters { \
        REAL(name); \
        return fails_fd(k, fd) ? -1 : real(__VA_ARGS__); \
    }

OPENER(open)
OPENER(open64)
OPENER_AT(openat)
OPENER_AT(openat64)
STREAM(fopen)
STREAM(fopen64)
ON_FD(ssize_t, read, READ, (int fd, void *to, size_t n), fd, to, n)
ON_FD(ssize_t, pread, READ, (int fd, void *to, size_t n, off_t at), fd, to, n, at)
ON_FD(ssize_t, pread64, READ, (int fd, void *to, size_t n, off64_t at), fd, to, n, at)
ON_FD(ssize_t, readv, READ, (int fd, const struct iovec *to, int n), fd, to, n)
ON_FD(ssize_t, write, WRITE, (int fd, const void *from, size_t n), fd, from, n)
ON_FD(ssize_t, pwrite, WRITE, (int fd, const void *from, size_t n, off_t at), fd, from, n, at)
ON_FD(ssize_t, pwrite64, WRITE, (int fd, const void *from, size_t n, off64_t at), fd, from, n, at)
ON_FD(ssize_t, writev, WRITE, (int fd, const struct iovec *from, int n), fd, from, n)
ON_FD(int, fsync, FSYNC, (int fd), fd)
ON_FD(int, fdatasync, FSYNC, (int fd), fd)

int rename(const char *from, const char *to) {
    REAL(rename);
    return fails_at(RENAME, AT_FDCWD, to) ? -1 : real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat);
    return fails_at(RENAME, b, to) ? -1 : real(a, from, b, to);
}
int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    return fails_at(MKDIR, AT_FDCWD, path) ? -1 : real(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(mkdirat);
    return fails_at(MKDIR, folder, path) ? -1 : real(folder, path, mode);
}
