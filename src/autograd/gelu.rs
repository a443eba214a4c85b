//! Who multiplies a gradient by the derivative of a GELU: the operation that made it, or its only reader.

use super::{Tape, Var};

/// A GELU whose reader has not multiplied the gradient by its derivative.
pub(super) struct Gelu {
    pub(super) output: Var,
    pre: Var, // its input
    read_once: bool,
}

impl Tape<'_> {
    /// Notes that `output` is the GELU of `pre`.
    pub(crate) fn note_gelu(&mut self, output: Var, pre: Var) {
        self.memory.gelus.push(Gelu { output, pre, read_once: false });
    }

    /// Promises that one `linear_residual`, as its `a`, is all that ever reads the output of a GELU. Its backward then hands the
    /// gradient on as that of the GELU's input. In main memory the output is recycled, since it is had from the input again, and
    /// the gradient takes the place of that input.
    pub(crate) fn read_once(&mut self, output: Var) {
        let Some(gelu) = self.memory.gelus.iter_mut().find(|gelu| gelu.output == output) else { return };
        gelu.read_once = true;
        if !self.on_cuda() {
            self.release(output);
        }
    }

    /// The input of the GELU that made `output`, where it is read once. Whoever takes it promises to multiply the gradient.
    pub(crate) fn take_before_gelu(&mut self, output: Var) -> Option<Var> {
        let at = self.memory.gelus.iter().position(|gelu| gelu.output == output && gelu.read_once)?;
        assert!(self.memory.grads[output.0 as usize].is_none(), "a GELU that is read once has one gradient");
        Some(self.memory.gelus.swap_remove(at).pre)
    }

    /// Whether nobody has multiplied the gradient by the derivative of the GELU of `pre`.
    pub(crate) fn gelu_is_pending(&self, pre: Var) -> bool {
        self.memory.gelus.iter().any(|gelu| gelu.pre == pre)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::Memory;

    #[test]
    #[should_panic(expected = "a GELU that is read once has one gradient")]
    fn a_second_reader_is_refused() {
        let mut memory = Memory::new();
        let mut tape = Tape::new(&[], &mut [], false, &mut memory);
        let [pre, output] = [0.5, 0.25].map(|x| tape.input(&[x; 4], [1, 1, 4], true).unwrap());
        tape.note_gelu(output, pre);
        tape.read_once(output);
        let of_another = tape.take(4);
        tape.put_grad(output, of_another);
        tape.take_before_gelu(output);
    }
}
