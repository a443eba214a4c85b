//! The kernel for AVX2: a [`Step`] in 12 registers of sums, 2 for B and 1 for an element of A.
//!
//! It is assembly because the number of instructions decides: next to another busy thread on the core, a round of 6 rows takes
//! as long as its instructions take to issue. They are 20, 12 of them multiplications, and 5 more for every four rounds; the
//! compiler adds up the address of each row, which makes 29.

use super::steps::{self, Step};
use super::{HALF, PANEL, Rows, Segment};
use std::arch::x86_64::{_mm256_loadu_ps, _mm256_setzero_ps, _mm256_storeu_ps, _mm256_stream_ps};

const LANES: usize = 8;
const BYTES: usize = size_of::<f32>();

/// # Safety
/// The processor has AVX2; `to` starts at a cache line, and nobody accesses it before this thread's next fence.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn stream(to: &mut [f32; PANEL], row: &[f32; PANEL]) {
    for v in (0..PANEL).step_by(LANES) {
        // SAFETY: in bounds; aligned by the contract.
        unsafe { _mm256_stream_ps(to.as_mut_ptr().add(v), _mm256_loadu_ps(row.as_ptr().add(v))) };
    }
}

/// # Safety
/// The processor has AVX2 and FMA; the step lies inside of its operands.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn step(step: Step) {
    // SAFETY: the contract is the same, and the step has as many rows as the name says.
    unsafe {
        match (step.layout, step.rows.len()) {
            (Rows { inner: 1, .. }, 1) => lines_1(step),
            (Rows { inner: 1, .. }, 2) => lines_2(step),
            (Rows { inner: 1, .. }, 3) => lines_3(step),
            (Rows { inner: 1, .. }, 4) => lines_4(step),
            (Rows { inner: 1, .. }, 5) => lines_5(step),
            (Rows { inner: 1, .. }, 6) => lines_6(step),
            (_, 1) => interleaved_1(step),
            (_, 2) => interleaved_2(step),
            (_, 3) => interleaved_3(step),
            (_, 4) => interleaved_4(step),
            (_, 5) => interleaved_5(step),
            (_, 6) => interleaved_6(step),
            _ => unreachable!("more rows than a step has"),
        }
    }
}

/// Adds the products of a row, whose element of A is at `$far + $near`.
macro_rules! row {
    ($far:literal, $near:literal, $left:literal, $right:literal) => {
        concat!(
            "vbroadcastss {factor}, [",
            $far,
            " + ",
            $near,
            "]\n",
            "vfmadd231ps ",
            $left,
            ", {factor}, {left}\n",
            "vfmadd231ps ",
            $right,
            ", {factor}, {right}\n",
        )
    };
}

/// The rows of a matrix are far from each other, the elements of a row side by side.
macro_rules! of_line {
    (0, $near:literal) => {
        row!("{a}", $near, "ymm0", "ymm1")
    };
    (1, $near:literal) => {
        row!("{a} + {far}", $near, "ymm2", "ymm3")
    };
    (2, $near:literal) => {
        row!("{a} + 2*{far}", $near, "ymm4", "ymm5")
    };
    (3, $near:literal) => {
        row!("{a3}", $near, "ymm6", "ymm7")
    };
    (4, $near:literal) => {
        row!("{a3} + {far}", $near, "ymm8", "ymm9")
    };
    (5, $near:literal) => {
        row!("{a3} + 2*{far}", $near, "ymm10", "ymm11")
    };
}

/// Interleaved rows are side by side, the elements of a row far from each other.
macro_rules! of_interleaved {
    (0, $far:literal) => {
        row!($far, "0", "ymm0", "ymm1")
    };
    (1, $far:literal) => {
        row!($far, "4", "ymm2", "ymm3")
    };
    (2, $far:literal) => {
        row!($far, "8", "ymm4", "ymm5")
    };
    (3, $far:literal) => {
        row!($far, "12", "ymm6", "ymm7")
    };
    (4, $far:literal) => {
        row!($far, "16", "ymm8", "ymm9")
    };
    (5, $far:literal) => {
        row!($far, "20", "ymm10", "ymm11")
    };
}

/// A round: one element of the inner dimension, which is at `$b` of B and at `$a` of a row, or of all rows, of A.
macro_rules! round {
    ($b:literal, $a:literal, $row:ident, [$($i:tt)*]) => {
        concat!(
            "vmovups {left}, [", $b, "]\n",
            "vmovups {right}, [", $b, " + 32]\n",
            $($row!($i, $a),)*
        )
    };
}

/// A kernel for these rows of one layout. `$far` is the larger of the two distances of A; then the addresses in A of four rounds
/// in a row.
macro_rules! kernel {
    ($name:ident, [$($i:tt)*], $row:ident, $far:ident, [$first:literal $second:literal $third:literal $fourth:literal]) => {
        /// # Safety
        /// The processor has AVX2 and FMA; the step has as many rows as the name says, and lies inside of its operands.
        #[target_feature(enable = "avx2,fma")]
        unsafe fn $name(step: Step) {
            let Step { rows, half, skip, layout, stride, segments, add } = step;
            let column = half * HALF;
            let mut sums = [[_mm256_setzero_ps(); 2]; steps::ROWS];
            if add {
                for i in [$($i),*] {
                    // SAFETY: half a panel lies inside of a row.
                    sums[i] = [0, LANES].map(|v| unsafe { _mm256_loadu_ps(rows[i].as_ptr().add(column + v)) });
                }
            }
            for &Segment { a, b, len } in segments {
                let (a, far) = (a.as_ptr().wrapping_add(skip), layout.$far);
                // SAFETY: it reads A and B inside of the step, by the contract, and leaves what it writes in the registers
                // named. Addresses beyond the last round are not read.
                unsafe {
                    std::arch::asm!(
                        "test {rest}, {rest}",
                        "jz 3f",
                        "2:",
                        round!("{b}", $first, $row, [$($i)*]),
                        "add {a}, {inner}",
                        "add {a3}, {inner}",
                        "add {b}, {stride}",
                        "dec {rest}",
                        "jnz 2b",
                        "3:",
                        "test {fours}, {fours}",
                        "jz 5f",
                        ".p2align 5",
                        "4:",
                        round!("{b}", $first, $row, [$($i)*]),
                        round!("{b} + {stride}", $second, $row, [$($i)*]),
                        round!("{b} + 2*{stride}", $third, $row, [$($i)*]),
                        round!("{b} + {stride3}", $fourth, $row, [$($i)*]),
                        "lea {a}, [{a} + 4*{inner}]",
                        "lea {a3}, [{a3} + 4*{inner}]",
                        "lea {b}, [{b} + 4*{stride}]",
                        "dec {fours}",
                        "jnz 4b",
                        "5:",
                        "/* {far} */",
                        rest = inout(reg) len % 4 => _,
                        fours = inout(reg) len / 4 => _,
                        a = inout(reg) a => _,
                        a3 = inout(reg) a.wrapping_add(far.wrapping_mul(3)) => _,
                        b = inout(reg) b[half].as_ptr() => _,
                        far = in(reg) far.wrapping_mul(BYTES),
                        inner = in(reg) layout.inner.wrapping_mul(BYTES),
                        stride = in(reg) stride.wrapping_mul(BYTES),
                        stride3 = in(reg) stride.wrapping_mul(3 * BYTES),
                        left = out(ymm_reg) _,
                        right = out(ymm_reg) _,
                        factor = out(ymm_reg) _,
                        inout("ymm0") sums[0][0], inout("ymm1") sums[0][1],
                        inout("ymm2") sums[1][0], inout("ymm3") sums[1][1],
                        inout("ymm4") sums[2][0], inout("ymm5") sums[2][1],
                        inout("ymm6") sums[3][0], inout("ymm7") sums[3][1],
                        inout("ymm8") sums[4][0], inout("ymm9") sums[4][1],
                        inout("ymm10") sums[5][0], inout("ymm11") sums[5][1],
                        options(readonly, nostack),
                    );
                }
            }
            for i in [$($i),*] {
                for v in 0..2 {
                    // SAFETY: as above.
                    unsafe { _mm256_storeu_ps(rows[i].as_mut_ptr().add(column + v * LANES), sums[i][v]) };
                }
            }
        }
    };
}

macro_rules! kernels_of_lines {
    ($($name:ident $rows:tt)*) => { $(kernel!($name, $rows, of_line, row, ["0" "4" "8" "12"]);)* };
}

macro_rules! kernels_of_interleaved {
    ($($name:ident $rows:tt)*) => {
        $(kernel!($name, $rows, of_interleaved, inner, ["{a}" "{a} + {far}" "{a} + 2*{far}" "{a3}"]);)*
    };
}

kernels_of_lines!(lines_1 [0] lines_2 [0 1] lines_3 [0 1 2] lines_4 [0 1 2 3] lines_5 [0 1 2 3 4] lines_6 [0 1 2 3 4 5]);
kernels_of_interleaved!(
    interleaved_1 [0] interleaved_2 [0 1] interleaved_3 [0 1 2] interleaved_4 [0 1 2 3] interleaved_5 [0 1 2 3 4]
    interleaved_6 [0 1 2 3 4 5]
);
