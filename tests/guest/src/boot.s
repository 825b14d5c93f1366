# Everything that must run in ring 0: the way up to long mode, the entries of the IDT, the gate
# through which ring 3 asks for privileged work, and the start of the other CPUs.
#
# Ring 0 is kept to a few instructions per visit on purpose. Some KVM back ends interpret ring 0
# and run only ring 3 on the CPU itself, so all Rust code of this guest lives in ring 3.
#
# Selectors follow the usual 64-bit layout:
#   0x10 ring 0 code, 0x18 ring 0 data, 0x2b ring 3 data, 0x33 ring 3 code, 0x40 + 16 n TSS of CPU n

.set KCODE, 0x10
.set KDATA, 0x18
.set UDATA, 0x2b
.set UCODE, 0x33
.set TSS0, 0x40
.set COM1, 0x3f8

# ---------------------------------------------------------------- the note the loader looks for
    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .long pvh_entry

# ---------------------------------------------------------------- the boot CPU: 32 bits, no paging
    .section .text.boot, "ax"
    .code32
    .global pvh_entry
pvh_entry:
    cli
    cld
    # The two descriptors whose addresses are spread over several fields.
    mov eax, offset boot_tss
    mov [boot_gdt + TSS0 + 2], ax
    shr eax, 16
    mov [boot_gdt + TSS0 + 4], al
    mov [boot_gdt + TSS0 + 7], ah
    mov eax, offset gate_entry
    mov [boot_idt + 13 * 16], ax
    shr eax, 16
    mov [boot_idt + 13 * 16 + 6], ax
    # The page tables are link-time data: nothing to build here.
    mov eax, 0x620                      # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xc0000080                 # EFER
    mov eax, 0x100                      # LME
    xor edx, edx
    wrmsr
    mov eax, 0x80000033                 # PG, NE, ET, MP, PE
    mov cr0, eax
    lgdt [boot_gdtr]
    ljmp KCODE, offset boot_long

    .code64
boot_long:
    mov edi, ebx                        # hvm_start_info, the argument of boot_main
    lidt [boot_idtr]
    mov eax, TSS0
    ltr ax
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov rsp, offset boot_slot
    push UDATA
    push offset boot_stack_top - 8      # as if boot_main had been called
    push 2                              # interrupts stay off until the full IDT is loaded
    push UCODE
    push offset {boot_main}
    iretq

# ---------------------------------------------------------------- the other CPUs
# Copied below 1 MiB. From real mode straight to long mode, with the tables of the boot CPU.
    .section .rodata.trampoline, "a"
    .code16
    .global trampoline_start
    .global trampoline_end
trampoline_start:
    cli
    mov eax, 0x620
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xc0000080
    mov eax, 0x100
    xor edx, edx
    wrmsr
    .byte 0x66, 0x2e, 0x0f, 0x01, 0x16  # lgdt cs:[...], 32-bit base
    .word trampoline_gdtr - trampoline_start
    mov eax, 0x80000033
    mov cr0, eax
    .byte 0x66, 0xea                    # far jump with a 32-bit offset
    .long ap_long
    .word KCODE
    .balign 4
trampoline_gdtr:
    .word TSS0 + 15
    .long boot_gdt
trampoline_end:

    .section .text.boot, "ax"
    .code64
ap_long:
    # Which CPU is this? The APIC id from CPUID, looked up in the table made from the MADT.
    xor ecx, ecx
    mov eax, [{AP_BOOT} + {AP_ID_LEAF}]
    cpuid
    cmp dword ptr [{AP_BOOT} + {AP_ID_LEAF}], 1
    jne 1f
    shr ebx, 24
    mov edx, ebx
1:  cmp edx, [{AP_BOOT} + {AP_IDS}]
    jae park
    mov rcx, [{AP_BOOT} + {AP_INDEX}]
    movzx eax, word ptr [rcx + rdx * 2]
    cmp eax, 0xffff
    je park
    imul rdi, rax, {CPU_SIZE}
    add rdi, [{AP_BOOT} + {AP_CPUS}]
    lgdt [{AP_BOOT} + {AP_GDTR}]
    lidt [{AP_BOOT} + {AP_IDTR}]
    shl eax, 4
    add eax, TSS0
    ltr ax
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    lea rsp, [rdi + {CPU_IRQ_SLOT}]
    # The local APIC: on, spurious vector, one-shot timer.
    cmp dword ptr [{AP_BOOT} + {AP_X2APIC}], 0
    je 2f
    xor edx, edx
    mov ecx, 0x1b
    mov eax, 0xfee00c00
    wrmsr
    mov ecx, 0x80f
    mov eax, 0x100 | {VECTOR_SPURIOUS}
    wrmsr
    mov ecx, 0x832
    mov eax, {VECTOR_TIMER}
    wrmsr
    mov ecx, 0x83e
    mov eax, 0xb
    wrmsr
    jmp 3f
2:  mov eax, 0xfee00000
    mov dword ptr [rax + 0xf0], 0x100 | {VECTOR_SPURIOUS}
    mov dword ptr [rax + 0x320], {VECTOR_TIMER}
    mov dword ptr [rax + 0x3e0], 0xb
3:  push UDATA
    push qword ptr [rdi + {CPU_STACK}]
    push 0x202                          # interrupts on
    push UCODE
    push offset {ap_main}
    iretq

park:
    cli
    hlt
    jmp park

# ---------------------------------------------------------------- ring 3's side of the gate
# `hlt` faults in ring 3 with #GP on every processor, hypervisor and emulator, and costs no exit
# of its own. The operation is in rax, its arguments are in rdi, rsi, rdx and r8.
    .text
    .global gate
gate:
gate_hlt:
    hlt
    ret

# ---------------------------------------------------------------- #GP: the gate, or a real fault
# Stack: error, rip, cs, rflags, rsp, ss, slot. The slot above each of the three stacks of a CPU
# holds the address of its Cpu structure.
gate_entry:
    cmp qword ptr [rsp + 8], offset gate_hlt
    jne gate_fault
    inc qword ptr [rsp + 8]             # hlt is one byte
    jmp [gate_table + rax * 8]
gate_return:
    add rsp, 8
    iretq
gate_fault:
    push 13
    jmp fault_common

op_out8:
    mov edx, edi
    mov eax, esi
    out dx, al
    jmp gate_return
op_out16:
    mov edx, edi
    mov eax, esi
    out dx, ax
    jmp gate_return
op_pci_read:
    mov edx, 0xcf8
    mov eax, edi
    out dx, eax
    mov edx, 0xcfc
    in eax, dx
    jmp gate_return
op_pci_write:
    mov edx, 0xcf8
    mov eax, edi
    out dx, eax
    mov edx, 0xcfc
    mov eax, esi
    out dx, eax
    jmp gate_return
op_rdmsr:
    mov ecx, edi
    rdmsr
    shl rdx, 32
    or rax, rdx
    jmp gate_return
op_wrmsr:
    mov ecx, edi
    mov rax, rsi
    mov rdx, rsi
    shr rdx, 32
    wrmsr
    jmp gate_return
op_cpuid:
    mov r8, rdx
    mov r9, rbx
    mov eax, edi
    mov ecx, esi
    cpuid
    mov [r8], eax
    mov [r8 + 4], ebx
    mov [r8 + 8], ecx
    mov [r8 + 12], edx
    mov rbx, r9
    jmp gate_return
# rdi: GDTR image, rsi: IDTR image, edx: TSS selector. Interrupts are on afterwards.
op_tables:
    lgdt [rdi]
    lidt [rsi]
    ltr dx
    or qword ptr [rsp + 24], 0x200
    jmp gate_return
# rsi: text, rdi: its length. Sixteen bytes at a time into an empty transmit FIFO.
op_emit:
    test rdi, rdi
    jz gate_return
    mov edx, COM1 + 5
    mov ecx, 1000000
1:  in al, dx
    test al, 0x20
    jnz 2f
    dec ecx
    jnz 1b
2:  mov ecx, 16
    cmp rdi, rcx
    cmovb rcx, rdi
    sub rdi, rcx
    mov edx, COM1
    rep outsb
    jmp op_emit
# Sleep unless something happened: rdi: a 16-bit counter, si: its value when last seen, r8: timer
# ticks when last seen, edx: timer count to arm, or 0. Interrupts are off from the #GP entry to
# the instruction after `sti`, so nothing can slip in between the look and the `hlt`. Returns 0 if
# it did nothing.
op_halt:
    xor eax, eax
    mov rcx, [rsp + 48]
    cmp [rdi], si
    jne gate_return
    cmp [rcx + {VECTOR_TIMER} * 8], r8
    jne gate_return
    test edx, edx
    jz 2f
    cmp dword ptr [{AP_BOOT} + {AP_X2APIC}], 0
    je 1f
    mov ecx, 0x838
    mov eax, edx
    xor edx, edx
    wrmsr
    jmp 2f
1:  mov ecx, 0xfee00380
    mov [rcx], edx
2:  sti
    hlt
    cli
    mov eax, 1
    jmp gate_return
# An empty IDT and a fault: the last way to end a machine.
op_triple_fault:
    lidt [empty_idtr]
    ud2

    .balign 8
gate_table:
    .quad op_out8, op_out16, op_pci_read, op_pci_write, op_rdmsr, op_wrmsr
    .quad op_cpuid, op_tables, op_emit, op_halt, park, op_triple_fault
empty_idtr:
    .word 0
    .quad 0

# ---------------------------------------------------------------- interrupts
# Count the vector in the Cpu structure, end of interrupt, back.
    .balign 16
    .global irq_stubs
irq_stubs:
    .set vector, 0x20
    .rept 0x100 - 0x20
    .balign 16
    push rax
    mov eax, vector * 8
    jmp irq_common
    .set vector, vector + 1
    .endr
# An interrupt line is for all queues of a device, and comes to one CPU, which passes it on to all
# others, with one write to the interrupt command register.
    .balign 16
    .global line_stubs
line_stubs:
    .set vector, {VECTOR_LINES}
    .rept {LINES}
    .balign 16
    push rax
    mov eax, vector * 8
    jmp line_common
    .set vector, vector + 1
    .endr
line_common:
    push rcx
    push rdx
    cmp dword ptr [{AP_BOOT} + {AP_X2APIC}], 0
    je 1f
    push rax
    mov ecx, 0x830
    mov eax, 0xc4000 | {VECTOR_SHARED}  # fixed, to all but this one
    xor edx, edx
    wrmsr
    pop rax
    jmp irq_count
1:  mov ecx, 0xfee00300
    mov dword ptr [rcx], 0xc4000 | {VECTOR_SHARED}
    jmp irq_count
irq_common:
    push rcx
    push rdx
irq_count:
    mov rcx, [rsp + 64]                 # three saved registers and five words of the frame
    inc qword ptr [rcx + rax]
    cmp eax, {VECTOR_SPURIOUS} * 8
    je 2f
    cmp dword ptr [{AP_BOOT} + {AP_X2APIC}], 0
    je 1f
    mov ecx, 0x80b
    xor eax, eax
    xor edx, edx
    wrmsr
    jmp 2f
1:  mov eax, 0xfee000b0
    mov dword ptr [rax], 0
2:  pop rdx
    pop rcx
    pop rax
    iretq

# ---------------------------------------------------------------- faults
# Note what happened in the Cpu structure, then go on in ring 3, on a fresh stack, in `crashed`.
    .balign 16
    .global fault_stubs
fault_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    .if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30
    .else
    push 0
    .endif
    push vector
    jmp fault_common
    .set vector, vector + 1
    .endr
fault_common:
    mov rdi, [rsp + 56]
    pop qword ptr [rdi + {CPU_CRASH}]
    pop qword ptr [rdi + {CPU_CRASH} + 8]
    mov rax, [rsp]
    mov [rdi + {CPU_CRASH} + 16], rax
    mov rax, cr2
    mov [rdi + {CPU_CRASH} + 24], rax
    mov rax, [rdi + {CPU_STACK}]
    mov [rsp + 24], rax
    mov rax, offset {crashed}
    mov [rsp], rax
    mov qword ptr [rsp + 8], UCODE
    mov qword ptr [rsp + 16], 2
    mov qword ptr [rsp + 32], UDATA
    iretq
    .global gate_entry

# ---------------------------------------------------------------- what the compiler expects
    .global memcpy, memmove, memset, memcmp, bcmp
memcpy:
    mov rax, rdi
    mov rcx, rdx
    rep movsb
    ret
memmove:
    mov rax, rdi
    mov rcx, rdx
    mov r8, rdi
    sub r8, rsi
    cmp r8, rdx
    jb 1f
    rep movsb
    ret
1:  lea rdi, [rdi + rdx - 1]
    lea rsi, [rsi + rdx - 1]
    std
    rep movsb
    cld
    ret
memset:
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret
bcmp:
memcmp:
    xor ecx, ecx
1:  cmp rcx, rdx
    je 2f
    movzx eax, byte ptr [rdi + rcx]
    movzx r8d, byte ptr [rsi + rcx]
    inc rcx
    sub eax, r8d
    je 1b
    ret
2:  xor eax, eax
    ret

# ---------------------------------------------------------------- tables of the boot CPU
    .section .data.tables, "aw"
    .balign 4096
    .global boot_pml4
boot_pml4:
    .quad boot_pdpt + 7
    .skip 4096 - 8
boot_pdpt:
    .quad boot_pd + 7, boot_pd + 0x1007, boot_pd + 0x2007, boot_pd + 0x3007
    .skip 4096 - 32
boot_pd:                                # 4 GiB in pages of 2 MiB, open to ring 3
    .set page, 0
    .rept 2048
    .quad page * 0x200000 + 0x87
    .set page, page + 1
    .endr
    .global boot_gdt
boot_gdt:
    .quad 0, 0
    .quad 0x00af9b000000ffff            # 0x10
    .quad 0x00cf93000000ffff            # 0x18
    .quad 0
    .quad 0x00cff3000000ffff            # 0x28
    .quad 0x00affb000000ffff            # 0x30
    .quad 0
    .quad 0x0000890000000067, 0         # 0x40, base filled in at entry
boot_gdtr:
    .word TSS0 + 15
    .quad boot_gdt
    .balign 8
boot_idt:                               # until the full one is loaded: only the gate
    .skip 13 * 16
    .word 0, KCODE, 0x8e01, 0
    .quad 0
boot_idtr:
    .word 14 * 16 - 1
    .quad boot_idt
    .balign 8
boot_tss:
    .long 0
    .quad 0, 0, 0, 0
    .quad boot_slot                     # IST 1
    .quad 0, 0, 0, 0, 0, 0, 0
    .long 0x680000

    .section .bss.boot, "aw", @nobits
    .balign 16
    .skip 1024
boot_slot:
    .skip 16
    .skip 65536
boot_stack_top:
