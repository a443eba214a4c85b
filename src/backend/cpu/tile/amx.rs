//! The kernels for AMX: 32 columns of 32 rows, of numbers in one part of bf16 or in three ([`super::super::split`]).
//!
//! Of one part, there is one product. With three, `a = a0 + a1 + a2` and `b` alike, `a b` is nine products of parts, each exact in f32. The three smallest are left out: they
//! are 2^-23 of it at most, mostly much less. Each of the others is summed over 32 inner elements before it is added to what is there:
//! that is rounded 6 times for those, not 32 times as in a chain of f32 products. Its errors are smaller (a test tells by how much).

use super::super::simd::LINE;
use super::super::split::{ROUNDED, block, by_parts};
use super::Lines;
#[cfg(doc)]
use super::PANEL;
use std::arch::asm;
use std::mem::offset_of;

/// All eight tile registers: 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Whether this process may use the tile registers: the system gives them to whoever asks.
pub(in super::super) fn available() -> bool {
    #[cfg(target_os = "linux")]
    {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        /// `ARCH_REQ_XCOMP_PERM` of `arch_prctl`, and `XFEATURE_XTILEDATA`.
        const REQUEST: [libc::c_long; 2] = [0x1023, 18];
        /// AMX-BF16 and AMX-TILE, in EDX of leaf 7.
        const FEATURES: u32 = 1 << 22 | 1 << 24;
        #[allow(unused_unsafe, reason = "unsafe until Rust 1.93")]
        // SAFETY: every x86-64 processor has the instruction.
        let (leaves, features) = unsafe { (__cpuid(0).eax, __cpuid_count(7, 0).edx) };
        if leaves < 7 || features & FEATURES != FEATURES {
            return false;
        }
        // SAFETY: this call reads no memory.
        unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST[0], REQUEST[1]) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// Makes the tile registers those of [`CONFIG`] on this thread.
///
/// # Safety
/// [`available`].
pub(super) unsafe fn set_up() {
    // SAFETY: the processor has the instruction, and the operand is a palette that every one has.
    unsafe {
        asm!(
            "ldtilecfg [{}]",
            in(reg) &raw const CONFIG,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags, readonly),
        );
    }
}

/// Gives them back.
///
/// # Safety
/// [`available`].
pub(super) unsafe fn release() {
    // SAFETY: the processor has the instruction, and what is in the registers is not kept.
    unsafe {
        asm!(
            "tilerelease",
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags, nomem),
        );
    }
}

/// What a kernel reads from memory when it needs it: there are too few registers.
#[repr(C)]
struct Rare {
    /// Where the sums go, in rows of [`PANEL`] numbers.
    to: *mut f32,
    /// Whether it adds to them.
    add: usize,
    /// Cache lines of `next` in a portion, and the end of `next`.
    of_next: usize,
    end_of_next: *const f32,
    /// Addresses of `lines` in a portion, each of two cache lines, and their end.
    of_lines: usize,
    end_of_lines: *const usize,
}

/// Portions of lines that a kernel fetches in a block: one after each group of products.
const fn portions(parts: usize) -> usize {
    if parts == ROUNDED { 1 } else { 6 }
}

/// Bytes between the rows of a tile of A.
const A_LINE: usize = 64;

/// Sums of one or two steps at `a` and one or two halves of a panel at `b`, over `blocks` of the inner dimension: written to rows of
/// [`PANEL`] numbers, or added to those. Meanwhile the cache lines of `next` and `lines` are fetched, a portion after
/// each group of products, until there are none left.
///
/// # Safety
/// [`available`], and [`set_up`] on this thread; `blocks` blocks of `parts` parts, at least one, are at each operand that is asked for, and all rows of
/// the steps at `to`.
#[expect(clippy::too_many_arguments, reason = "operands and sizes")]
pub(super) unsafe fn multiply(
    parts: usize,
    to: *mut f32,
    add: bool,
    [steps, halves]: [usize; 2],
    a: [*const f32; 2],
    b: [*const f32; 2],
    blocks: usize,
    next: &[f32],
    lines: &mut Lines,
) {
    let kernel = by_parts!(parts, P => match (steps, halves) {
        (2, 2) => OfParts::<P>::two_steps,
        (2, _) => OfParts::<P>::two_steps_of_a_half,
        (_, 2) => OfParts::<P>::one_step,
        (_, _) => OfParts::<P>::one_step_of_a_half,
    });
    let portions = portions(parts) * blocks;
    let of_next = next.len().div_ceil(LINE).div_ceil(portions);
    let (lines, of_lines) = lines.in_portions(portions);
    let (end_of_next, end_of_lines) = (next.as_ptr_range().end, lines.as_ptr_range().end);
    let rare = Rare { to, add: usize::from(add), of_next, end_of_next, of_lines, end_of_lines };
    // SAFETY: the contract is the same; the lines are whole portions.
    unsafe { kernel(&rare, a, b, blocks, next.as_ptr(), lines.as_ptr()) }
}

/// Loads part `$part` of a block of A into each of its tile registers.
macro_rules! load_a {
    ([$($to:literal: $from:literal),*], $part:literal) => {
        concat!($("tileloadd tmm", $to, ", [{", $from, "} + {a_line} + 1024 * ", $part, "]\n",)*)
    };
}

/// Loads part `$part` of a block of B into each of its tile registers.
macro_rules! load_b {
    ([$($to:literal: $from:literal),*], $part:literal) => {
        concat!($("tileloadd tmm", $to, ", [{", $from, "} + {b_line} + 64 * ", $part, "]\n",)*)
    };
}

/// Adds to each sum the product of its factors; then fetches a portion of the lines.
macro_rules! add {
    ([$($to:literal: $a:literal $b:literal to $at:literal),*]) => {
        concat!($("tdpbf16ps tmm", $to, ", tmm", $a, ", tmm", $b, "\n",)* fetch_lines!())
    };
}

/// The products of a block of one part, or of three, in an order in which each has a factor of the one before.
macro_rules! block {
    (1, $a:tt, $b:tt, $c:tt) => {
        concat!(load_a!($a, "0"), load_b!($b, "0"), add!($c))
    };
    (3, $a:tt, $b:tt, $c:tt) => {
        concat!(
            load_a!($a, "0"),
            load_b!($b, "2"),
            add!($c),
            load_b!($b, "1"),
            add!($c),
            load_a!($a, "1"),
            add!($c),
            load_b!($b, "0"),
            add!($c),
            load_a!($a, "2"),
            add!($c),
            load_a!($a, "0"),
            add!($c),
        )
    };
}

/// The sums start with zero, or with what is there.
macro_rules! clear {
    ([$($to:literal: $a:literal $b:literal to $at:literal),*]) => { concat!($("tilezero tmm", $to, "\n",)*) };
}
macro_rules! load_sums {
    ([$($to:literal: $a:literal $b:literal to $at:literal),*]) => {
        concat!($("tileloadd tmm", $to, ", [{line} + {a_line} + ", $at, "]\n",)*)
    };
}
macro_rules! store_sums {
    ([$($to:literal: $a:literal $b:literal to $at:literal),*]) => {
        concat!($("tilestored [{line} + {a_line} + ", $at, "], tmm", $to, "\n",)*)
    };
}

/// Fetches a portion of the lines, not all of a block at once: while many are on their way, there is less room for those that the kernel
/// loads. Those of `lines` are fetched to be written, as most of them are. Measured (2 cores of an Intel Xeon): over 4 blocks, portions
/// take 15 % off the kernel's time.
macro_rules! fetch_lines {
    () => {
        concat!(
            "cmp {next}, [{rare} + {end_of_next}]\n",
            "jae 4f\n",
            "mov {count}, [{rare} + {of_next}]\n",
            "3:\n",
            "prefetcht1 [{next}]\n",
            "add {next}, 64\n",
            "dec {count}\n",
            "jnz 3b\n",
            "4:\n",
            "cmp {lines}, [{rare} + {end_of_lines}]\n",
            "jae 6f\n",
            "mov {count}, [{rare} + {of_lines}]\n",
            "5:\n",
            "mov {line}, [{lines}]\n",
            "prefetchw [{line}]\n",
            "prefetchw [{line} + 64]\n",
            "add {lines}, 8\n",
            "dec {count}\n",
            "jnz 5b\n",
            "6:\n",
        )
    };
}

/// The kernels for numbers of `P` parts.
struct OfParts<const P: usize>;

/// A kernel: which tile registers hold which steps of A and halves of B, and for each sum its register, those of its factors, and
/// where in a tile of C it is.
macro_rules! kernel {
    ($(#[$meta:meta])* $name:ident, parts: $parts:tt, a: $a:tt, b: $b:tt, c: $c:tt) => {
        $(#[$meta])*
        ///
        /// # Safety
        /// That of [`multiply`]; from `lines` to `rare.end_of_lines` are whole portions of `rare.of_lines` addresses. What the kernel does
        /// not name is not read.
        unsafe fn $name(
            rare: &Rare,
            a: [*const f32; 2],
            b: [*const f32; 2],
            blocks: usize,
            next: *const f32,
            lines: *const usize,
        ) {
            // SAFETY: it reads `blocks` blocks of each operand that it names and the addresses, and writes sums of 16 rows for each
            // step; a prefetch of any address changes nothing.
            unsafe {
                asm!(
                    // What the sums start with.
                    "mov {line}, [{rare} + {add}]",
                    "test {line}, {line}",
                    "jnz 2f",
                    clear!($c),
                    "jmp 3f",
                    "2:",
                    "mov {line}, [{rare} + {to}]",
                    "add {a_line}, {a_line}",
                    load_sums!($c),
                    "shr {a_line}",
                    "3:",
                    "2:",
                    block!($parts, $a, $b, $c),
                    "add {first}, {block}",
                    "add {second}, {block}",
                    "add {left}, {block}",
                    "add {right}, {block}",
                    "dec {blocks}",
                    "jnz 2b",
                    "mov {line}, [{rare} + {to}]",
                    "add {a_line}, {a_line}",
                    store_sums!($c),
                    rare = in(reg) rare,
                    first = inout(reg) a[0] => _,
                    second = inout(reg) a[1] => _,
                    left = inout(reg) b[0] => _,
                    right = inout(reg) b[1] => _,
                    a_line = inout(reg) A_LINE => _,
                    // Bytes between the rows of a tile of B, which are pairs of inner elements.
                    b_line = in(reg) 64usize * $parts,
                    blocks = inout(reg) blocks => _,
                    next = inout(reg) next => _,
                    lines = inout(reg) lines => _,
                    count = out(reg) _,
                    line = out(reg) _,
                    block = const block($parts) * size_of::<f32>(),
                    to = const offset_of!(Rare, to),
                    add = const offset_of!(Rare, add),
                    of_next = const offset_of!(Rare, of_next),
                    of_lines = const offset_of!(Rare, of_lines),
                    end_of_next = const offset_of!(Rare, end_of_next),
                    end_of_lines = const offset_of!(Rare, end_of_lines),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

macro_rules! kernels {
    ($parts:tt) => {
        impl OfParts<$parts> {
            kernel! {
                /// Two steps, two halves.
                two_steps, parts: $parts,
                a: ["4": "first", "5": "second"], b: ["6": "left", "7": "right"],
                c: ["0": "4" "6" to "0", "1": "4" "7" to "64", "2": "5" "6" to "2048", "3": "5" "7" to "2048 + 64"]
            }

            kernel! {
                /// Two steps, one half.
                two_steps_of_a_half, parts: $parts,
                a: ["4": "first", "5": "second"], b: ["6": "left"],
                c: ["0": "4" "6" to "0", "2": "5" "6" to "2048"]
            }

            kernel! {
                /// One step, two halves.
                one_step, parts: $parts,
                a: ["4": "first"], b: ["6": "left", "7": "right"],
                c: ["0": "4" "6" to "0", "1": "4" "7" to "64"]
            }

            kernel! {
                /// One step, one half.
                one_step_of_a_half, parts: $parts,
                a: ["4": "first"], b: ["6": "left"],
                c: ["0": "4" "6" to "0"]
            }
        }
    };
}

kernels!(1);
kernels!(3);
