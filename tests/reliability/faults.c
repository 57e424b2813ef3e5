/* Makes the N-th call of one kind below one directory fail, for whoever in the process makes it.

   Loaded before libc, so that it stands below Python, TensorStore and every other library. It is
   armed and disarmed through ctypes. A call counts when the path that it names, or that its
   descriptor was opened with, lies below the directory. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN, READ, WRITE, SYNC, RENAME, MKDIR, UNLINK, MMAP, LINK, LIST, KINDS };

static char root[4096];
static size_t root_length;
static atomic_int armed_kind = -1;
static atomic_long seen, failed;
static long first;
static int code, is_sticky;

void faults_arm(const char *directory, int kind, long nth, int error, int sticky) {
    atomic_store(&armed_kind, -1);
    snprintf(root, sizeof root, "%s/", directory);
    root_length = strlen(root);
    first = nth;
    code = error;
    is_sticky = sticky;
    atomic_store(&seen, 0);
    atomic_store(&failed, 0);
    atomic_store(&armed_kind, kind);
}

/* Returns how many calls were made to fail. */
long faults_disarm(void) {
    atomic_store(&armed_kind, -1);
    return atomic_load(&failed);
}

static int lies_below(const char *path) {
    size_t length = strlen(path);
    return !strncmp(path, root, root_length) || (length == root_length - 1 && !strncmp(path, root, length));
}

static int path_of(int descriptor, char *path, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, size - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return 1;
}

static int fails(enum kind kind) {
    long call = atomic_fetch_add(&seen, 1) + 1;
    if (call < first || (call > first && !is_sticky)) return 0;
    (void)kind;
    atomic_fetch_add(&failed, 1);
    errno = code;
    return 1;
}

static int path_fails(enum kind kind, int at, const char *path) {
    if (atomic_load(&armed_kind) != (int)kind || !path) return 0;
    int saved = errno;
    char whole[8192];
    if (path[0] != '/' && at != AT_FDCWD) {
        char base[4096];
        if (!path_of(at, base, sizeof base)) return 0;
        snprintf(whole, sizeof whole, "%s/%s", base, path);
        path = whole;
    }
    errno = saved;
    return lies_below(path) && fails(kind);
}

static int descriptor_fails(enum kind kind, int descriptor) {
    if (atomic_load(&armed_kind) != (int)kind) return 0;
    int saved = errno;
    char path[4096];
    int is_known = path_of(descriptor, path, sizeof path);
    errno = saved;
    return is_known && lies_below(path) && fails(kind);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define BY_PATH(kind, type, bad, name, path, parameters, arguments)                                 \
    type name parameters {                                                                         \
        static __typeof__(&name) next;                                                             \
        if (!next) next = NEXT(name);                                                              \
        return path_fails(kind, AT_FDCWD, path) ? bad : next arguments;                             \
    }
#define BY_PATH_AT(kind, type, name, at, path, parameters, arguments)                               \
    type name parameters {                                                                         \
        static __typeof__(&name) next;                                                             \
        if (!next) next = NEXT(name);                                                              \
        return path_fails(kind, at, path) ? -1 : next arguments;                                    \
    }
#define BY_DESCRIPTOR(kind, type, bad, name, parameters, arguments)                                 \
    type name parameters {                                                                         \
        static __typeof__(&name) next;                                                             \
        if (!next) next = NEXT(name);                                                              \
        return descriptor_fails(kind, fd) ? bad : next arguments;                                   \
    }
#define OPENS(name)                                                                                \
    int name(const char *path, int flags, ...) {                                                   \
        static int (*next)(const char *, int, ...);                                                \
        va_list more;                                                                              \
        va_start(more, flags);                                                                     \
        mode_t mode = va_arg(more, mode_t);                                                        \
        va_end(more);                                                                              \
        if (!next) next = dlsym(RTLD_NEXT, #name);                                                 \
        return path_fails(OPEN, AT_FDCWD, path) ? -1 : next(path, flags, mode);                     \
    }
#define OPENS_AT(name)                                                                             \
    int name(int at, const char *path, int flags, ...) {                                           \
        static int (*next)(int, const char *, int, ...);                                           \
        va_list more;                                                                              \
        va_start(more, flags);                                                                     \
        mode_t mode = va_arg(more, mode_t);                                                        \
        va_end(more);                                                                              \
        if (!next) next = dlsym(RTLD_NEXT, #name);                                                 \
        return path_fails(OPEN, at, path) ? -1 : next(at, path, flags, mode);                       \
    }

OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)
BY_PATH(OPEN, FILE *, NULL, fopen, path, (const char *path, const char *mode), (path, mode))
BY_PATH(OPEN, FILE *, NULL, fopen64, path, (const char *path, const char *mode), (path, mode))

BY_DESCRIPTOR(READ, ssize_t, -1, read, (int fd, void *to, size_t n), (fd, to, n))
BY_DESCRIPTOR(READ, ssize_t, -1, pread, (int fd, void *to, size_t n, off_t at), (fd, to, n, at))
BY_DESCRIPTOR(READ, ssize_t, -1, pread64, (int fd, void *to, size_t n, off64_t at), (fd, to, n, at))
BY_DESCRIPTOR(READ, ssize_t, -1, readv, (int fd, const struct iovec *to, int n), (fd, to, n))
BY_DESCRIPTOR(READ, ssize_t, -1, preadv, (int fd, const struct iovec *to, int n, off_t at), (fd, to, n, at))
BY_DESCRIPTOR(READ, ssize_t, -1, preadv64, (int fd, const struct iovec *to, int n, off64_t at), (fd, to, n, at))

BY_DESCRIPTOR(WRITE, ssize_t, -1, write, (int fd, const void *from, size_t n), (fd, from, n))
BY_DESCRIPTOR(WRITE, ssize_t, -1, pwrite, (int fd, const void *from, size_t n, off_t at), (fd, from, n, at))
BY_DESCRIPTOR(WRITE, ssize_t, -1, pwrite64, (int fd, const void *from, size_t n, off64_t at), (fd, from, n, at))
BY_DESCRIPTOR(WRITE, ssize_t, -1, writev, (int fd, const struct iovec *from, int n), (fd, from, n))
BY_DESCRIPTOR(WRITE, ssize_t, -1, pwritev, (int fd, const struct iovec *from, int n, off_t at), (fd, from, n, at))
BY_DESCRIPTOR(WRITE, ssize_t, -1, pwritev64, (int fd, const struct iovec *from, int n, off64_t at), (fd, from, n, at))
BY_DESCRIPTOR(WRITE, int, -1, ftruncate, (int fd, off_t length), (fd, length))
BY_DESCRIPTOR(WRITE, int, -1, ftruncate64, (int fd, off64_t length), (fd, length))

BY_DESCRIPTOR(SYNC, int, -1, fsync, (int fd), (fd))
BY_DESCRIPTOR(SYNC, int, -1, fdatasync, (int fd), (fd))
BY_DESCRIPTOR(SYNC, int, -1, syncfs, (int fd), (fd))

BY_PATH(RENAME, int, -1, rename, from, (const char *from, const char *to), (from, to))
BY_PATH_AT(RENAME, int, renameat, at, from, (int at, const char *from, int to_at, const char *to), (at, from, to_at, to))
BY_PATH_AT(RENAME, int, renameat2, at, from, (int at, const char *from, int to_at, const char *to, unsigned flags), (at, from, to_at, to, flags))

BY_PATH(MKDIR, int, -1, mkdir, path, (const char *path, mode_t mode), (path, mode))
BY_PATH_AT(MKDIR, int, mkdirat, at, path, (int at, const char *path, mode_t mode), (at, path, mode))

BY_PATH(UNLINK, int, -1, unlink, path, (const char *path), (path))
BY_PATH(UNLINK, int, -1, rmdir, path, (const char *path), (path))
BY_PATH_AT(UNLINK, int, unlinkat, at, path, (int at, const char *path, int flags), (at, path, flags))

BY_DESCRIPTOR(MMAP, void *, MAP_FAILED, mmap, (void *to, size_t n, int protect, int flags, int fd, off_t at), (to, n, protect, flags, fd, at))
BY_DESCRIPTOR(MMAP, void *, MAP_FAILED, mmap64, (void *to, size_t n, int protect, int flags, int fd, off64_t at), (to, n, protect, flags, fd, at))

BY_PATH(LINK, int, -1, link, from, (const char *from, const char *to), (from, to))
BY_PATH_AT(LINK, int, linkat, at, from, (int at, const char *from, int to_at, const char *to, int flags), (at, from, to_at, to, flags))

BY_PATH(LIST, DIR *, NULL, opendir, path, (const char *path), (path))
