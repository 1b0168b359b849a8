"""The command line: one module for each verb, with its flags, its help and one call.

This package owns parsing arguments, printing results and exit codes. It may import every other
package, but a verb imports what it needs only when it runs. Every module here is a verb, except
`main` (finds the verb, turns errors into exit codes), `arguments` (flags that several verbs share)
and `output` (printing). A verb's module has

- `HELP`, its line in `simsiam --help`, and `GROUP`, the heading that this line stands under;
- `add_arguments(parser)`, which adds its flags, and `run(options)`, which does the work;
- where needed `USAGE`, `EPILOG`, and `MULTI_PROCESS = True` for a verb that torchrun may start.

To add a verb, add its module. Start with `main`.
"""
