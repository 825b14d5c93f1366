# Guests of a few instructions. They start as PVH says: at 1 MiB, in 32-bit protected mode without
# paging, with the address of the start info in EBX; they have no stack.
#
# Each is a length and then the code. Memory from SCRATCH on is theirs and zero.

.set CODE, 0x100000
.set SCRATCH, 0x200000
.set COM1, 0x3f8

.macro payload name
    .section .rodata.payloads, "a"
    .balign 4
    .global payload_\name
payload_\name:
    .long payload_\name\()_end - payload_\name - 4
    .code32
.endm

.macro end name
payload_\name\()_end:
    .code64
    .text
.endm

# Sends AL by COM1 once there is room. Changes EDX and AH.
.macro put_al
    mov ah, al
    mov edx, COM1 + 5
77: in al, dx
    test al, 0x20
    jz 77b
    mov al, ah
    mov edx, COM1
    out dx, al
.endm

.macro stop
77: cli
    hlt
    jmp 77b
.endm

# SLP_EN with SLP_TYP 0 in PM1a control.
.macro power_off
    mov edx, 0x604
    mov eax, 0x2000
    out dx, ax
    stop
.endm

# An empty IDT and a fault.
.macro triple_fault
    lidt [SCRATCH]
    ud2
.endm

# EDI: the FADT.
.macro find_fadt
    mov esi, [ebx + 32]                 # RSDP
    mov esi, [esi + 24]                 # XSDT
76: mov edi, [esi + 36]
    add esi, 8
    cmp dword ptr [edi], 0x50434146     # "FACP"
    jne 76b
.endm

payload spin
2:  jmp 2b
end spin

payload fault
    triple_fault
end fault

# Sends its command line and powers off.
payload cmdline
    mov esi, [ebx + 24]
2:  mov al, [esi]
    inc esi
    test al, al
    jz 3f
    put_al
    jmp 2b
3:  power_off
end cmdline

# Started by Multiboot: sends EAX, the command line, each module's string and content, the boot
# loader's name and the memory map, each with its length in front (32 bits), and ends by debug-exit.
.macro put_long                         # EAX
    mov ebp, eax
    .rept 4
    mov eax, ebp
    put_al
    shr ebp, 8
    .endr
.endm
.macro put_bytes                        # ECX of them from ESI
    mov eax, ecx
    put_long
73: jecxz 74f
    mov al, [esi]
    put_al
    inc esi
    dec ecx
    jmp 73b
74:
.endm
.macro put_text                         # from ESI to its NUL
    xor ecx, ecx
75: cmp byte ptr [esi + ecx], 0
    je 76f
    inc ecx
    jmp 75b
76: put_bytes
.endm

payload multiboot
    put_long
    mov esi, [ebx + 16]
    put_text
    mov edi, [ebx + 24]
2:  cmp dword ptr [ebx + 20], 0
    je 3f
    mov esi, [edi + 8]
    put_text
    mov esi, [edi]
    mov ecx, [edi + 4]
    sub ecx, esi
    put_bytes
    add edi, 16
    dec dword ptr [ebx + 20]
    jmp 2b
3:  mov esi, [ebx + 64]
    put_text
    mov esi, [ebx + 48]
    mov ecx, [ebx + 44]
    put_bytes
    mov al, 5
    out 0xf4, al
    stop
end multiboot

.macro say_ready
    .irpc letter, ready
    mov al, '\letter'
    put_al
    .endr
.endm

# Says "ready", waits for the power button, says "!" and powers off.
payload button
    mov edx, 0x602                      # PWRBTN_EN
    mov eax, 0x100
    out dx, ax
    say_ready
2:  mov edx, 0x600
    in ax, dx
    test ah, 1                          # PWRBTN_STS
    jz 2b
    mov al, '!'
    put_al
    power_off
end button

# Says "ready", then sends back what it gets; "q" powers off, Ctrl-R resets, "t" is a
# triple fault.
payload echo
    say_ready
2:  mov edx, COM1 + 5
    in al, dx
    test al, 1
    jz 2b
    mov edx, COM1
    in al, dx
    cmp al, 'q'
    je 3f
    cmp al, 't'
    je 4f
    cmp al, 0x12                        # Ctrl-R
    je 5f
    put_al
    jmp 2b
3:  power_off
4:  triple_fault
5:  mov al, 0xfe
    out 0x64, al
    stop
end echo

# Sends without end.
payload flood
2:  mov al, '~'
    put_al
    jmp 2b
end flood

# Powers off as an operating system does: the port from the FADT, the value from _S5 in the DSDT.
payload acpi_power_off
    find_fadt
    mov edx, [edi + 64]                 # PM1a_CNT_BLK
    mov esi, [edi + 140]                # X_DSDT
2:  inc esi
    cmp dword ptr [esi], 0x5f35535f     # "_S5_", then package, its length, its number of elements
    jne 2b
    movzx eax, byte ptr [esi + 7]
    cmp al, 0x0a                        # a byte constant
    jne 3f
    movzx eax, byte ptr [esi + 8]
3:  shl eax, 10
    or eax, 0x2000
    out dx, ax
    stop
end acpi_power_off

# Resets as the FADT says.
payload acpi_reset
    find_fadt
    mov edx, [edi + 120]                # RESET_REG, an I/O port
    mov al, [edi + 128]                 # RESET_VALUE
    out dx, al
    stop
end acpi_reset

# For each function 00:NN.0 that there is: its number, its 256 bytes of configuration space by
# ports 0xcf8 and 0xcfc, and num_queues from the common configuration at BAR 0 if it is virtio.
payload pci
    xor ebp, ebp
2:  xor ecx, ecx
    lea eax, [ebp + 0x80000000]
    mov edx, 0xcf8
    out dx, eax
    mov edx, 0xcfc
    in eax, dx
    cmp eax, -1
    je 8f
    mov esi, eax                        # device and vendor
    mov eax, ebp
    shr eax, 11
    put_al
3:  lea eax, [ebp + ecx + 0x80000000]
    mov edx, 0xcf8
    out dx, eax
    mov edx, 0xcfc
    in eax, dx
    cmp ecx, 0x10
    jne 4f
    mov ebx, eax                        # BAR 0
4:  mov edi, eax
    .rept 4
    mov eax, edi
    put_al
    shr edi, 8
    .endr
    add ecx, 4
    cmp ecx, 256
    jne 3b
    xor edi, edi
    cmp si, 0x1af4
    jne 5f
    and ebx, -16
    movzx edi, word ptr [ebx + 18]
5:  mov eax, edi
    put_al
    shr edi, 8
    mov eax, edi
    put_al
8:  add ebp, 0x800
    cmp ebp, 0x10000
    jne 2b
    power_off
end pci

# Starts the CPU with APIC id 1 by INIT and SIPI. That one sends "A" from real mode and leaves a
# mark; this one waits for the mark, sends "B" and powers off.
payload two_cpus
    jmp 3f                              # two bytes, so the other CPU's code is at CODE + 2
    .code16
    mov al, 'A'
    mov dx, COM1
    out dx, al
    mov byte ptr [0x9000], 1
    stop
    .code32
3:  mov esi, CODE + 2
    mov edi, 0x8000
    mov ecx, 32
    rep movsb
    mov dword ptr [0xfee000f0], 0x1ff   # the local APIC is on
    mov dword ptr [0xfee00310], 1 << 24
    mov dword ptr [0xfee00300], 0x4500  # INIT
    mov dword ptr [0xfee00300], 0x4608  # start-up at 0x8000
2:  pause
    cmp byte ptr [0x9000], 1
    jne 2b
    mov al, 'B'
    put_al
    power_off
end two_cpus
