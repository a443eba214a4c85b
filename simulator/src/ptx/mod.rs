//! The reader: PTX text to a plain tree. It knows the grammar and no instruction.

pub(crate) mod ast;
mod code;
mod declaration;
mod lexer;
mod parser;

pub(crate) use parser::parse;
