//! Element-wise operations over the 32 lanes of a warp, as plain function pointers.
//!
//! Every constructor takes a closure without captures and gives a function that loads 32 operands, computes all lanes
//! (operations have no side effects, so idle lanes may compute too) and stores those of the mask. Where the host has
//! AVX2 and FMA, a second copy is compiled for them, and the compiler vectorises the loop.
//!
//! An operation knows how wide its operands are, from the types of its closure; the compiler of PTX compares that with
//! the registers that it gives the operation, so none reads or writes beyond them.

use crate::program::{AluFn, Inst, NONE};
use std::sync::LazyLock;

/// What an operation takes its operand for, and what a place in a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Width {
    /// No operand, or a number.
    Nothing,
    /// A bit per lane.
    Pred,
    /// A predicate to write, or [`NONE`].
    PredOrNone,
    /// The parameter of [`combine`]: perhaps with a predicate in it.
    Join,
    /// 32 bits per lane, also for 8 and 16.
    Single,
    /// 64 bits per lane.
    Double,
}

/// An operation with the widths of its operands `d`, `a`, `b`, `c`, `e`.
#[derive(Clone, Copy)]
pub(crate) struct Alu {
    pub run: AluFn,
    pub widths: [Width; 5],
}

/// What a lane holds: a 32-bit register (also for 8 and 16 bits) or a 64-bit one.
pub(crate) trait El: Copy + Default + 'static {
    const WIDTH: Width;
}
impl El for u32 {
    const WIDTH: Width = Width::Single;
}
impl El for u64 {
    const WIDTH: Width = Width::Double;
}

#[cfg(target_arch = "x86_64")]
pub(crate) static WIDE: LazyLock<bool> = LazyLock::new(|| {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("popcnt")
});
#[cfg(not(target_arch = "x86_64"))]
pub(crate) static WIDE: LazyLock<bool> = LazyLock::new(|| false);

/// The 32 values at word offset `at`.
///
/// # Safety
/// See [`AluFn`].
#[inline(always)]
pub(crate) unsafe fn load<T: El>(frame: *mut u32, at: u32) -> [T; 32] {
    // SAFETY: the caller's frame holds 32 values of T at `at`, aligned.
    unsafe { frame.add(at as usize).cast::<[T; 32]>().read() }
}

/// Stores the lanes of `mask`.
///
/// # Safety
/// See [`AluFn`].
#[inline(always)]
pub(crate) unsafe fn store<T: El>(frame: *mut u32, at: u32, values: &[T; 32], mask: u32) {
    // SAFETY: as in `load`; nothing else refers to the frame meanwhile.
    let to = unsafe { &mut *frame.add(at as usize).cast::<[T; 32]>() };
    if mask == u32::MAX {
        *to = *values;
    } else {
        for i in 0..32 {
            if mask >> i & 1 != 0 {
                to[i] = values[i];
            }
        }
    }
}

/// The predicate word at `at`, negated if asked.
///
/// # Safety
/// See [`AluFn`].
#[inline(always)]
pub(crate) unsafe fn pred(frame: *mut u32, at: u32, not: bool) -> u32 {
    // SAFETY: the offset lies inside the frame.
    let word = unsafe { *frame.add(at as usize) };
    if not { !word } else { word }
}

/// Sets the lanes of `mask` in the predicate word at `at`.
///
/// # Safety
/// See [`AluFn`].
#[inline(always)]
pub(crate) unsafe fn set_pred(frame: *mut u32, at: u32, value: u32, mask: u32) {
    if at != NONE {
        // SAFETY: the offset lies inside the frame.
        let word = unsafe { &mut *frame.add(at as usize) };
        *word = *word & !mask | value & mask;
    }
}

/// A value of a zero-sized type, given that one exists.
#[inline(always)]
fn conjure<F: Copy>() -> F {
    const { assert!(size_of::<F>() == 0, "operations capture nothing") };
    // SAFETY: F has no bytes, and the constructor that names F was given a value of it, so F is inhabited.
    unsafe { std::mem::zeroed() }
}

macro_rules! constructor {
    ($(#[$doc:meta])* $name:ident<$($g:ident),*>($($arg:ty),*) -> $ret:ty, [$($width:expr),*], |$regs:ident, $inst:ident, $mask:ident, $f:ident| $body:block) => {
        $(#[$doc])*
        pub(crate) fn $name<$($g: El,)* F: Fn($($arg),*) -> $ret + Copy + 'static>(_: F) -> Alu {
            let widths = [$($width),*];
            #[inline(always)]
            unsafe fn body<$($g: El,)* F: Fn($($arg),*) -> $ret + Copy + 'static>($regs: *mut u32, $inst: &Inst, $mask: u32) {
                let $f = conjure::<F>();
                // SAFETY: the caller keeps the promise of `AluFn`.
                unsafe { $body }
            }
            unsafe fn plain<$($g: El,)* F: Fn($($arg),*) -> $ret + Copy + 'static>(r: *mut u32, i: &Inst, m: u32) {
                // SAFETY: passed on.
                unsafe { body::<$($g,)* F>(r, i, m) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,lzcnt,bmi1,bmi2,popcnt")]
            unsafe fn wide<$($g: El,)* F: Fn($($arg),*) -> $ret + Copy + 'static>(r: *mut u32, i: &Inst, m: u32) {
                // SAFETY: passed on.
                unsafe { body::<$($g,)* F>(r, i, m) }
            }
            #[cfg(target_arch = "x86_64")]
            if *WIDE {
                return Alu { run: wide::<$($g,)* F>, widths };
            }
            Alu { run: plain::<$($g,)* F>, widths }
        }
    };
}

use Width::{Join, Nothing, Pred, PredOrNone, Single};

constructor!(/// `d = f(a)`.
op1<D, A>(A) -> D, [D::WIDTH, A::WIDTH, Nothing, Nothing, Nothing], |r, i, mask, f| {
    let a: [A; 32] = load(r, i.a);
    let mut d = [D::default(); 32];
    for l in 0..32 {
        d[l] = f(a[l]);
    }
    store(r, i.d, &d, mask);
});

constructor!(/// `d = f(a, b)`.
op2<D, A, B>(A, B) -> D, [D::WIDTH, A::WIDTH, B::WIDTH, Nothing, Nothing], |r, i, mask, f| {
    let (a, b): ([A; 32], [B; 32]) = (load(r, i.a), load(r, i.b));
    let mut d = [D::default(); 32];
    for l in 0..32 {
        d[l] = f(a[l], b[l]);
    }
    store(r, i.d, &d, mask);
});

constructor!(/// `d = f(a, b, c)`.
op3<D, A, B, C>(A, B, C) -> D, [D::WIDTH, A::WIDTH, B::WIDTH, C::WIDTH, Nothing], |r, i, mask, f| {
    let (a, b, c): ([A; 32], [B; 32], [C; 32]) = (load(r, i.a), load(r, i.b), load(r, i.c));
    let mut d = [D::default(); 32];
    for l in 0..32 {
        d[l] = f(a[l], b[l], c[l]);
    }
    store(r, i.d, &d, mask);
});

constructor!(/// `d = f(a, parameter)`.
op1p<D, A>(A, u32) -> D, [D::WIDTH, A::WIDTH, Nothing, Nothing, Nothing], |r, i, mask, f| {
    let a: [A; 32] = load(r, i.a);
    let mut d = [D::default(); 32];
    for l in 0..32 {
        d[l] = f(a[l], i.e);
    }
    store(r, i.d, &d, mask);
});

constructor!(/// `d = f(a, b, parameter)`.
op2p<D, A, B>(A, B, u32) -> D, [D::WIDTH, A::WIDTH, B::WIDTH, Nothing, Nothing], |r, i, mask, f| {
    let (a, b): ([A; 32], [B; 32]) = (load(r, i.a), load(r, i.b));
    let mut d = [D::default(); 32];
    for l in 0..32 {
        d[l] = f(a[l], b[l], i.e);
    }
    store(r, i.d, &d, mask);
});

constructor!(/// `d = f(a, b, c, parameter)`.
op3p<D, A, B, C>(A, B, C, u32) -> D, [D::WIDTH, A::WIDTH, B::WIDTH, C::WIDTH, Nothing], |r, i, mask, f| {
    let (a, b, c): ([A; 32], [B; 32], [C; 32]) = (load(r, i.a), load(r, i.b), load(r, i.c));
    let mut d = [D::default(); 32];
    for l in 0..32 {
        d[l] = f(a[l], b[l], c[l], i.e);
    }
    store(r, i.d, &d, mask);
});

constructor!(/// `d = f(a, b, c, e)`, `a` and `b` of one type, `c` and `e` of another.
op4<D, A, C>(A, A, C, C) -> D, [D::WIDTH, A::WIDTH, A::WIDTH, C::WIDTH, C::WIDTH], |r, i, mask, f| {
    let (a, b): ([A; 32], [A; 32]) = (load(r, i.a), load(r, i.b));
    let (c, e): ([C; 32], [C; 32]) = (load(r, i.c), load(r, i.e));
    let mut d = [D::default(); 32];
    for l in 0..32 {
        d[l] = f(a[l], b[l], c[l], e[l]);
    }
    store(r, i.d, &d, mask);
});

constructor!(/// Predicate `d = f(a, b)`; `c` and `e` hold the second result and the combination (see [`combine`]).
cmp<A>(A, A) -> bool, [PredOrNone, A::WIDTH, A::WIDTH, PredOrNone, Join], |r, i, mask, f| {
    let (a, b): ([A; 32], [A; 32]) = (load(r, i.a), load(r, i.b));
    let mut hit = [0u32; 32];
    for l in 0..32 {
        hit[l] = (f(a[l], b[l]) as u32) << l;
    }
    let word = hit.iter().fold(0, |x, y| x | y);
    combine(r, i, word, mask);
});

constructor!(/// Predicate `d = f(a)`.
test<A>(A) -> bool, [PredOrNone, A::WIDTH, Nothing, Nothing, Nothing], |r, i, mask, f| {
    let a: [A; 32] = load(r, i.a);
    let mut hit = [0u32; 32];
    for l in 0..32 {
        hit[l] = (f(a[l]) as u32) << l;
    }
    let word = hit.iter().fold(0, |x, y| x | y);
    set_pred(r, i.d, word, mask);
});

constructor!(/// `d = carry`-using sum: `f(a, b, carry in) -> (sum, carry out)`; bit 0 of the parameter reads the carry
/// at `c`, bit 1 writes it.
carry<A>(A, A, bool) -> (A, bool), [A::WIDTH, A::WIDTH, A::WIDTH, Pred, Nothing], |r, i, mask, f| {
    let (a, b): ([A; 32], [A; 32]) = (load(r, i.a), load(r, i.b));
    let carry_in = if i.e & 1 != 0 { pred(r, i.c, false) } else { 0 };
    let (mut d, mut out) = ([A::default(); 32], 0u32);
    for l in 0..32 {
        let (sum, c) = f(a[l], b[l], carry_in >> l & 1 != 0);
        d[l] = sum;
        out |= (c as u32) << l;
    }
    store(r, i.d, &d, mask);
    if i.e & 2 != 0 {
        set_pred(r, i.c, out, mask);
    }
});

constructor!(/// `d = f(a, b, predicate at c)`; the parameter's bit 0 negates it.
choose<A>(A, A, bool) -> A, [A::WIDTH, A::WIDTH, A::WIDTH, Pred, Nothing], |r, i, mask, f| {
    let (a, b): ([A; 32], [A; 32]) = (load(r, i.a), load(r, i.b));
    let p = pred(r, i.c, i.e & 1 != 0);
    let mut d = [A::default(); 32];
    for l in 0..32 {
        d[l] = f(a[l], b[l], p >> l & 1 != 0);
    }
    store(r, i.d, &d, mask);
});

/// Finishes a comparison: the parameter's low 3 bits choose 0 nothing, 1 and, 2 or, 3 xor with the predicate at
/// `e >> 4`, bit 3 negates that; `c` gets the same of the negated comparison.
///
/// # Safety
/// See [`AluFn`].
#[inline(always)]
pub(crate) unsafe fn combine(r: *mut u32, i: &Inst, word: u32, mask: u32) {
    // SAFETY: the caller keeps the promise of `AluFn`.
    unsafe {
        let other = if i.e & 7 != 0 { pred(r, i.e >> 4, i.e & 8 != 0) } else { 0 };
        let join = |w: u32| match i.e & 7 {
            1 => w & other,
            2 => w | other,
            3 => w ^ other,
            _ => w,
        };
        set_pred(r, i.d, join(word), mask);
        set_pred(r, i.c, join(!word), mask);
    }
}

/// Bitwise operations on predicates: `d = f(a, b)`; the parameter's bits 0 and 1 negate `a` and `b`.
pub(crate) fn preds<F: Fn(u32, u32) -> u32 + Copy + 'static>(_: F) -> Alu {
    unsafe fn run<F: Fn(u32, u32) -> u32 + Copy + 'static>(r: *mut u32, i: &Inst, mask: u32) {
        // SAFETY: the caller keeps the promise of `AluFn`.
        unsafe {
            let (a, b) = (pred(r, i.a, i.e & 1 != 0), pred(r, i.b, i.e & 2 != 0));
            set_pred(r, i.d, conjure::<F>()(a, b), mask);
        }
    }
    Alu { run: run::<F>, widths: [PredOrNone, Pred, Pred, Nothing, Nothing] }
}

/// Does nothing: for instructions that the executor runs itself.
pub(crate) fn idle() -> AluFn {
    unsafe fn run(_: *mut u32, _: &Inst, _: u32) {}
    run
}

/// Sets a register or predicate from predicate `a`: `set.` results. `d = a ? parameter : 0`.
pub(crate) fn spread() -> Alu {
    unsafe fn run(r: *mut u32, i: &Inst, mask: u32) {
        // SAFETY: the caller keeps the promise of `AluFn`.
        unsafe {
            let p = pred(r, i.a, false);
            let d: [u32; 32] = std::array::from_fn(|l| if p >> l & 1 != 0 { i.e } else { 0 });
            store(r, i.d, &d, mask);
        }
    }
    Alu { run, widths: [Single, Pred, Nothing, Nothing, Nothing] }
}
